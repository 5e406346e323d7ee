package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxOpen bounds the moments that are open at once: each may have a VM.
	maxOpen = 8
	// maxNames bounds the names that are remembered.
	maxNames = 4096
	// stick is how long a name that moves stays with a moment after its last use: who works below it is not to be moved.
	stick = time.Minute
	// fresh is how long the list of points is taken for true.
	fresh = time.Second
)

// moments keeps those open that are in use, or were a short while ago.
type moments struct {
	src  Source
	o    Options
	now  func() time.Time
	ctx  context.Context // ends with the mount
	stop context.CancelFunc
	done chan struct{} // closed when the janitor has ended

	mu     sync.Mutex // guards what follows, and users, last and gone of each held
	closed bool
	open   map[uint64]*held   // by LSN
	all    map[*held]struct{} // also those that are gone from open, and still in use
	names  map[string]name
	points []Point
	asked  time.Time // when points was
	ids    map[volumeID]uint64
	lastID uint64
}

type held struct {
	lsn    uint64
	users  int
	last   time.Time     // when the last use ended
	gone   bool          // from open: its last user closes it
	opened chan struct{} // closed when m and err are there
	m      Moment
	err    error
	roots  sync.Map // by volume: a descriptor of the directory with its files; closed before the moment is
}

// close ends an open moment that nobody uses.
func (h *held) close() error {
	h.roots.Range(func(_, fd any) bool {
		_ = unix.Close(fd.(int)) // it was for looking only
		return true
	})
	return h.m.Close()
}

// broken reports whether it is open and of no use.
func (h *held) broken() bool {
	select {
	case <-h.opened:
		return h.err != nil || h.m.Err() != nil
	default:
		return false
	}
}

type name struct {
	lsn  uint64
	last time.Time
}

// volumeID is a volume, as it was opened once: another time it may have other numbers.
type volumeID struct {
	opening *held
	volume  string
	dev     uint64
}

func newMoments(src Source, o Options) *moments {
	ctx, stop := context.WithCancel(context.Background())
	m := &moments{
		src: src, o: o, now: time.Now, ctx: ctx, stop: stop, done: make(chan struct{}),
		open: map[uint64]*held{}, all: map[*held]struct{}{}, names: map[string]name{}, ids: map[volumeID]uint64{},
	}
	go m.tidy()
	return m
}

// tidy closes what is idle.
func (m *moments) tidy() {
	defer close(m.done)
	t := time.NewTicker(max(m.o.Idle/8, 10*time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-t.C:
		}
		m.mu.Lock()
		var idle []*held
		for _, h := range m.open {
			if h.users == 0 && m.now().Sub(h.last) >= m.o.Idle {
				idle = append(idle, m.drop(h)...)
			}
		}
		for s, n := range m.names {
			if m.now().Sub(n.last) > stick {
				delete(m.names, s)
			}
		}
		m.mu.Unlock()
		m.end(idle)
	}
}

// drop takes a moment out of those that are open, and returns it if nobody uses it. mu must be held.
func (m *moments) drop(h *held) []*held {
	h.gone = true
	if m.open[h.lsn] == h {
		delete(m.open, h.lsn)
	}
	if h.users > 0 {
		return nil
	}
	return []*held{h}
}

// end closes moments that are gone and that nobody uses.
func (m *moments) end(all []*held) {
	for _, h := range all {
		if h.m != nil {
			if err := h.close(); err != nil {
				m.o.Problem(fmt.Errorf("close the moment of LSN %d: %w", h.lsn, err))
			}
		}
		m.mu.Lock()
		delete(m.all, h)
		for id := range m.ids {
			if id.opening == h {
				delete(m.ids, id)
			}
		}
		m.mu.Unlock()
	}
}

// use has a moment open until it is released.
func (m *moments) use(lsn uint64) (*held, error) {
	h, first, old, err := m.take(lsn)
	m.end(old)
	if err != nil {
		return nil, err
	}
	if first {
		// Whoever asks first may go away; those who wait with them do not.
		ctx, cancel := m.asking()
		h.m, h.err = m.src.Open(ctx, lsn)
		cancel()
		if h.err == nil && m.ctx.Err() != nil {
			h.m.Break()
		}
		close(h.opened)
	}
	<-h.opened
	if h.err != nil {
		m.release(h)
		return nil, &unavailable{fmt.Errorf("open the moment of LSN %d: %w", lsn, h.err)}
	}
	return h, nil
}

// take finds a moment, or makes one that the caller is the first to use and opens; old is for the caller to end.
func (m *moments) take(lsn uint64) (h *held, first bool, old []*held, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, false, nil, os.ErrClosed
	}
	h = m.open[lsn]
	if h != nil && h.broken() {
		old = m.drop(h)
		h = nil
	}
	if h == nil {
		if len(m.open) >= maxOpen {
			idle := m.longestIdle()
			if idle == nil {
				return nil, false, old, fmt.Errorf("%d moments are in use at once, and no more are opened: %w", maxOpen, syscall.EBUSY)
			}
			old = append(old, m.drop(idle)...)
		}
		first = true
		h = &held{lsn: lsn, opened: make(chan struct{})}
		m.open[lsn], m.all[h] = h, struct{}{}
	}
	h.users++
	return h, first, old, nil
}

// longestIdle is the moment that nobody has used for the longest time; nil if all are in use. mu must be held.
func (m *moments) longestIdle() (idle *held) {
	for _, h := range m.open {
		if h.users == 0 && (idle == nil || h.last.Before(idle.last)) {
			idle = h
		}
	}
	return idle
}

func (m *moments) release(h *held) {
	m.mu.Lock()
	h.users--
	h.last = m.now()
	var old []*held
	if h.gone || h.err != nil {
		old = m.drop(h)
	}
	m.mu.Unlock()
	m.end(old)
}

// do calls fn with a moment, for as long as a use may take.
func (m *moments) do(lsn uint64, fn func(Moment) error) error {
	h, err := m.use(lsn)
	if err != nil {
		return err
	}
	defer m.release(h)
	return m.bounded(h.m, func() error { return fn(h.m) })
}

// shows reports whether the files of a volume have been found, and the moment is open.
func (m *moments) shows(lsn uint64, volume string) bool {
	m.mu.Lock()
	h := m.open[lsn]
	m.mu.Unlock()
	if h == nil {
		return false
	}
	_, ok := h.roots.Load(volume)
	return ok
}

// bounded calls fn. If it takes longer than the limit the moment is broken: what shows a file may hang on what is hostile.
func (m *moments) bounded(mo Moment, fn func() error) error {
	t := time.AfterFunc(m.o.Limit, func() {
		m.o.Problem(fmt.Errorf("something of a moment was not read in %v: what shows it is ended", m.o.Limit))
		mo.Break()
	})
	defer t.Stop()
	return fn()
}

// breakAll ends whatever hangs, and lets nothing begin.
func (m *moments) breakAll() {
	m.stop()
	m.mu.Lock()
	m.closed = true
	var all []*held
	for h := range m.all {
		all = append(all, h)
	}
	m.mu.Unlock()
	for _, h := range all {
		select {
		case <-h.opened:
			if h.m != nil {
				h.m.Break()
			}
		default: // whoever opens it sees that the mount has ended
		}
	}
}

// close ends every moment. Hardly anybody uses one any more, and nobody begins to.
func (m *moments) close() error {
	m.stop()
	<-m.done
	m.mu.Lock()
	m.closed = true
	var errs []error
	var all []*held
	for h := range m.all {
		all = append(all, h)
	}
	m.mu.Unlock()
	for _, h := range all {
		<-h.opened
		m.mu.Lock()
		used := h.users > 0
		m.mu.Unlock()
		switch {
		case h.m == nil:
		case used:
			errs = append(errs, h.m.Close()) // its descriptors are in somebody's hands
		default:
			errs = append(errs, h.close())
		}
	}
	return errors.Join(errs...)
}

// asking bounds a question to the source. A request's own context ends with any signal to who made it, which is no error of a file's.
func (m *moments) asking() (context.Context, context.CancelFunc) {
	return context.WithTimeout(m.ctx, m.o.Limit)
}

// list is the points that there are.
func (m *moments) list() ([]Point, error) {
	m.mu.Lock()
	points, asked := m.points, m.asked
	m.mu.Unlock()
	if !asked.IsZero() && m.now().Sub(asked) < fresh {
		return points, nil
	}
	ctx, cancel := m.asking()
	defer cancel()
	points, err := m.src.Points(ctx)
	if err != nil {
		return nil, &unavailable{err}
	}
	m.mu.Lock()
	m.points, m.asked = points, m.now()
	m.mu.Unlock()
	return points, nil
}

// resolve finds the moment of a name. A name that moves stays for a while with the moment that it meant when it was last used.
func (m *moments) resolve(s string) (uint64, error) {
	m.mu.Lock()
	n, ok := m.names[s]
	if ok && m.now().Sub(n.last) < stick {
		m.names[s] = name{n.lsn, m.now()}
		m.mu.Unlock()
		return n.lsn, nil
	}
	m.mu.Unlock()
	ctx, cancel := m.asking()
	defer cancel()
	lsn, moves, err := m.src.Resolve(ctx, s)
	switch {
	case errors.Is(err, ErrNoMoment):
		return 0, syscall.ENOENT
	case err != nil:
		return 0, &unavailable{err}
	case !moves:
		return lsn, nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.names) < maxNames {
		m.names[s] = name{lsn, m.now()}
	}
	return lsn, nil
}

// keep says that a name, if it is one that moves, is in use.
func (m *moments) keep(s string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n, ok := m.names[s]; ok {
		m.names[s] = name{n.lsn, m.now()}
	}
}

const inoBits = 44

// ino is the number that a file with several names has in this mount: the same for all of them. 0: it has none, and gets any.
func (m *moments) ino(id volumeID, ino uint64) uint64 {
	if ino >= 1<<inoBits {
		return 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n, ok := m.ids[id]
	if !ok {
		m.lastID++
		n = m.lastID
		m.ids[id] = n
	}
	if n >= 1<<(63-inoBits) { // from 1<<63 on numbers are the library's
		return 0
	}
	return n<<inoBits | ino
}
