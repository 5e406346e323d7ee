package tidemark

import (
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/tidemark-cdp/tidemark"

// mayImport says which rooms of this module a room may import, besides those
// below itself. A room is the longest prefix that is listed. What two rooms
// share is journal/record; they meet only in cmd.
var mayImport = map[string][]string{
	"":                           {},
	"cmd":                        {"cmd", "nbd", "journal", "guest", "replica", "restore"},
	"nbd":                        {},
	"nbd/client":                 {"nbd/internal/proto"},
	"nbd/kernel":                 {"nbd/client", "nbd/internal/proto"},
	"nbd/internal/proto":         {},
	"journal":                    {},
	"journal/record":             {},
	"journal/internal/osfile":    {},
	"journal/retain":             {"journal/record"},
	"journal/segment":            {"journal/record", "journal/internal/osfile"},
	"journal/index":              {"journal/record", "journal/internal/osfile"},
	"journal/disk":               {"journal/record", "journal/segment", "journal/internal/osfile"},
	"guest":                      {"journal/record"},
	"replica":                    {"journal/record"},
	"replica/wire":               {"journal/record"},
	"replica/link":               {"replica", "journal/record"},
	"restore":                    {"journal/record"},
	"restore/export":             {"nbd"},
	"restore/guestfs":            {"nbd", "restore/export"},
	"restore/mount":              {"nbd"},
	"restore/internal/inventory": {},
	"fuzz":                       {},
	"cmd/internal/bench":         {"nbd", "journal/record", "replica", "cmd/internal/api", "cmd/internal/wan"},
	"cmd/internal/wan":           {},
	"cmd/internal/build":         {},
	"cmd/internal/port":          {},
	"cmd/tidemark-guest":         {"cmd/internal/build", "cmd/internal/port"},
	"cmd/internal/config":        {"guest", "journal/record", "journal/retain"},
}

// keptTo says in which rooms alone a library may be used, and why.
var keptTo = map[string]struct {
	rooms []string
	why   string
}{
	"github.com/cockroachdb/pebble":       {[]string{"journal"}, "Pebble's types stay under journal"},
	"github.com/spf13/cobra":              {[]string{"cmd"}, "flags are the programs'"},
	"os/signal":                           {[]string{"cmd"}, "signals are the programs'"},
	"flag":                                {[]string{"cmd/internal/bench"}, "cobra has the programs' flags"},
	"testing":                             {[]string{}, "no test hooks in production code"},
	"github.com/stretchr/testify":         {[]string{}, "no test hooks in production code"},
	"github.com/pojntfx/go-nbd":           {[]string{"nbd"}, "the protocol is nbd's"},
	"github.com/goccy/go-yaml":            {[]string{"cmd/internal/config"}, "YAML is the configuration's"},
	"github.com/coreos/go-systemd":        {[]string{"cmd/tidemarkd"}, "systemd is the daemon's"},
	"github.com/digitalocean/go-libvirt":  {[]string{"guest"}, "guests are reached there alone"},
	"github.com/beevik/etree":             {[]string{"guest"}, "definitions are guests'"},
	"github.com/prometheus/client_golang": {[]string{"cmd"}, "metrics registries are the programs'"},
	"golang.org/x/time":                   {[]string{"cmd/tidemarkd"}, "who may ask how often is the daemon's"},
	"github.com/schollz/progressbar":      {[]string{"cmd/tidemark"}, "the terminal is the client's"},
	"github.com/vishvananda/netlink":      {[]string{"nbd/kernel", "replica/link"}, "the kernel is spoken to there"},
	"github.com/klauspost/compress":       {[]string{"replica/wire", "journal/segment"}, "what is compressed is the wire's, and segments at rest"},
	"github.com/zeebo/blake3":             {[]string{"replica/link"}, "blocks are compared there"},
	"github.com/hanwen/go-fuse":           {[]string{"restore/mount"}, "go-fuse's types stay there"},
}

type pkg struct {
	ImportPath, Dir  string
	Imports, GoFiles []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,Imports,GoFiles", "./...").Output()
	require.NoError(t, err)
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else {
			require.NoError(t, err)
		}
		all = append(all, p)
	}
	require.Greater(t, len(all), 10)
	return all
}

func under(path, room string) bool {
	return room == "" || path == room || strings.HasPrefix(path, room+"/")
}

func roomOf(path string) string {
	best := ""
	for room := range mayImport {
		if under(path, room) && len(room) > len(best) {
			best = room
		}
	}
	return best
}

func TestRoomsImportOnlyWhatTheyMay(t *testing.T) {
	for _, p := range packages(t) {
		rel := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		room := roomOf(rel)
		for _, imp := range p.Imports {
			if to, ok := strings.CutPrefix(imp, module+"/"); ok {
				allowed := room != "" && under(to, room) || slices.ContainsFunc(mayImport[room], func(r string) bool { return under(to, r) })
				require.True(t, allowed, "%s imports %s: room %q may import %v", rel, to, room, mayImport[room])
			}
			for lib, rule := range keptTo {
				if under(imp, lib) || strings.HasPrefix(imp, lib+"/") {
					ok := slices.ContainsFunc(rule.rooms, func(r string) bool { return under(rel, r) })
					require.True(t, ok, "%s imports %s: %s", rel, imp, rule.why)
				}
			}
		}
	}
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	for _, p := range packages(t) {
		longest := ""
		for _, name := range p.GoFiles {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.ParseComments|parser.PackageClauseOnly)
			require.NoError(t, err)
			if doc := f.Doc.Text(); len(doc) > len(longest) {
				longest = doc
			}
		}
		require.GreaterOrEqual(t, len(longest), 120, "%s has no package comment worth the name", p.ImportPath)
	}
}
