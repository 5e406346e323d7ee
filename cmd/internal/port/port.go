// Package port is what a guest and the daemon say to each other over the guest's virtio-serial port
// [Name]: JSON, a line each way.
//
// It promises that fields are added, never renamed or removed. A guest must give each question an id of
// its own, and pass over answers with another: the port outlives the program that asked. The daemon must
// believe nothing of what it reads. Values are not safe for concurrent change. Limits: a line has at most MaxLine bytes.
package port

import "time"

const (
	// Name is the port's name in the guest: /dev/virtio-ports/Name.
	Name = "org.tidemark.0"
	// MaxLine bounds a line, in bytes.
	MaxLine = 4096
	// MaxID bounds a question's id, in bytes.
	MaxID = 64
)

// Question asks for a marker.
type Question struct {
	ID          string `json:"id"`
	Mark        string `json:"mark"` // the label
	Description string `json:"description,omitempty"`
}

// Answer says what became of it: Error is empty if the marker is durable.
type Answer struct {
	ID    string    `json:"id"`
	Group string    `json:"group,omitempty"`
	Label string    `json:"label,omitempty"`
	LSN   uint64    `json:"lsn,omitempty"`
	Time  time.Time `json:"time,omitzero"`
	Error string    `json:"error,omitempty"`
}
