// Package build says which version of Tidemark a program is. It promises a
// text that is never empty; it has no state, no format and no limits, and is safe for concurrent use.
package build

import "runtime/debug"

// version is set by the linker: -X …/cmd/internal/build.version=v1.2.3.
var version = ""

// Version is the release, or what Go knows of the source it was built from.
func Version() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return "devel-" + s.Value[:min(12, len(s.Value))]
			}
		}
	}
	return "devel"
}
