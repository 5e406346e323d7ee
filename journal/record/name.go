package record

import (
	"fmt"
	"strings"
)

const maxName = 63

// CheckName says whether a group or a disk may have this name: letters,
// digits, '.', '_' and '-', at most 63, a letter or digit first. Names become
// directories and parts of export names.
func CheckName(name string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("name %q has %d bytes: 1 to %d are allowed", name, len(name), maxName)
	}
	for i, r := range name {
		alnum := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		if !alnum && (i == 0 || !strings.ContainsRune("._-", r)) {
			return fmt.Errorf("name %q: %q is not allowed there (letters, digits, '.', '_', '-', a letter or digit first)", name, r)
		}
	}
	return nil
}

// ExportName is a parsed export name, GROUP/DISK or GROUP/DISK@POINT.
type ExportName struct {
	Group, Disk string
	Point       Point
	Live        bool // no @POINT: the disk itself
}

// ParseExportName reads GROUP/DISK or GROUP/DISK@POINT.
func ParseExportName(s string) (ExportName, error) {
	name, point, past := strings.Cut(s, "@")
	group, disk, ok := strings.Cut(name, "/")
	if !ok {
		return ExportName{}, fmt.Errorf("export %q: expected GROUP/DISK or GROUP/DISK@POINT", s)
	}
	for _, n := range []string{group, disk} {
		if err := CheckName(n); err != nil {
			return ExportName{}, fmt.Errorf("export %q: %w", s, err)
		}
	}
	e := ExportName{Group: group, Disk: disk, Live: !past}
	if past {
		p, err := ParsePoint(point)
		if err != nil {
			return ExportName{}, fmt.Errorf("export %q: %w", s, err)
		}
		e.Point = p
	}
	return e, nil
}

func (e ExportName) String() string {
	if e.Live {
		return e.Group + "/" + e.Disk
	}
	return e.Group + "/" + e.Disk + "@" + e.Point.String()
}
