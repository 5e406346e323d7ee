package record

import (
	"encoding/binary"
	"fmt"
	"time"
)

// Definition is what describes a guest beside its disks, as a libvirt domain's XML, in force from
// an LSN on until the next one of its name.
type Definition struct {
	Name    string
	Since   LSN       // in force from here on
	Time    time.Time // of Since
	Gone    bool      // there is none of this name from here on
	Content []byte
}

// MaxDefinition bounds a definition's content, in bytes.
const MaxDefinition = 1 << 20

const (
	definitionVersion = 1
	definitionFixed   = 24
)

// Append encodes the definition's payload to dst:
//
//	offset size field
//	  0     1   version, 1
//	  1     1   1: gone
//	  2     1   length of the name
//	  3     5   zero
//	  8     8   since, LSN; 0: the record's own
//	 16     8   time of since, Unix nanoseconds
//	 24     …   name, content
//
// Integers are little-endian. A record that names another LSN than its own repeats a definition
// whose own record expired while it was in force.
func (d *Definition) Append(dst []byte) []byte {
	le := binary.LittleEndian
	dst = append(dst, definitionVersion, 0, byte(len(d.Name)), 0, 0, 0, 0, 0)
	if d.Gone {
		dst[len(dst)-7] = 1
	}
	dst = le.AppendUint64(dst, uint64(d.Since))
	dst = le.AppendUint64(dst, uint64(d.Time.UnixNano()))
	dst = append(dst, d.Name...)
	return append(dst, d.Content...)
}

// DecodeDefinition reads a definition from its record's header and payload, of which it keeps
// no part.
func DecodeDefinition(lsn LSN, b []byte) (Definition, error) {
	if len(b) < definitionFixed || len(b) < definitionFixed+int(b[2]) || len(b) > definitionFixed+int(b[2])+MaxDefinition {
		return Definition{}, fmt.Errorf("%w: definition LSN %d of %d bytes", ErrCorrupt, lsn, len(b))
	}
	if b[0] != definitionVersion {
		return Definition{}, fmt.Errorf("definition LSN %d has version %d: this program knows %d; use a newer one", lsn, b[0], definitionVersion)
	}
	le := binary.LittleEndian
	end := definitionFixed + int(b[2])
	d := Definition{
		Gone: b[1] == 1, Since: LSN(le.Uint64(b[8:])), Time: time.Unix(0, int64(le.Uint64(b[16:]))).UTC(),
		Name: string(b[definitionFixed:end]), Content: append([]byte(nil), b[end:]...),
	}
	if d.Since == 0 {
		d.Since = lsn
	}
	if d.Since > lsn {
		return Definition{}, fmt.Errorf("%w: definition LSN %d is in force from LSN %d", ErrCorrupt, lsn, d.Since)
	}
	return d, CheckName(d.Name)
}
