package guestfs

import (
	"context"
	"errors"
)

// A Way has file systems shown as directories. Each stands on an overlay that is thrown away: a journal that
// is not empty is replayed there, as the guest's own recovery would.
type Way interface {
	// Open begins with volumes whose names differ. Nothing is opened before it is asked for.
	Open(ctx context.Context, volumes []Volume) (Opened, error)
}

// Opened is volumes that are ready to be shown.
type Opened interface {
	// Dir is where this process finds a volume's files, until Close: a directory, and no link to one. It may take as long as the start of a
	// small VM. What is in there may be hostile: links lead to the host.
	Dir(ctx context.Context, volume string) (string, error)
	// Err is why nothing is shown any more; nil if all is well.
	Err() error
	// Break ends what shows the files, so that uses fail, also those that wait: it may hang on what is hostile. Where several share it,
	// it ends when the last of them has given it up. What the kernel itself reads from is ended by who attached it.
	Break()
	// Close ends it in order. Files that are open then are errors sooner or later.
	Close() error
}

// ErrUnsupported says that a volume holds nothing that can be shown as files.
var ErrUnsupported = errors.New("no file system that is supported")

// ErrEnded says that what showed the files has ended, or was ended.
var ErrEnded = errors.New("what shows the files has ended")

// ErrStale says that a file system would not be shown as its guest would see it.
var ErrStale = errors.New("it would be shown as it never was")

// driver is what Linux calls a file system's driver.
func driver(fstype string) string {
	switch fstype {
	case TypeExt:
		return "ext4"
	case TypeNTFS:
		return "ntfs-3g"
	}
	return fstype
}

// mountOptions are those of a file system, beside what every mount has: read-only, and nothing of it is run.
func mountOptions(fstype string) []string {
	switch fstype {
	case TypeExt:
		return []string{"errors=remount-ro"} // an image may ask for a panic
	case TypeXFS:
		return []string{"nouuid"} // another moment's may be mounted
	case TypeFAT:
		return []string{"utf8"}
	case TypeBtrfs:
		return []string{"subvolid=5"} // the top, whichever the guest has as its default
	}
	return nil
}
