package record

// Lost is what an original that is damaged held: some blocks of a disk, as they were from one LSN to another.
type Lost struct {
	Disk     DiskID
	First    int64 // block
	Blocks   int   // up to MaxLostBlocks
	From, To LSN
}

// MaxLostBlocks bounds a Lost.
const MaxLostBlocks = 256

// LostContent is what another daemon has of a Lost as of an LSN, and the reigns of its journal. Of a block that the disk ends in there are as many bytes as it has.
type LostContent struct {
	At     LSN
	Reigns Reigns
	Bytes  []byte
}
