package guest

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

const (
	syncCommand = "guest-sync-delimited"
	freeze      = "guest-fsfreeze-freeze"
	status      = "guest-fsfreeze-status"
	thaw        = "guest-fsfreeze-thaw"
)

// outcome is what a cut may come to. What holds of all: a record at rest was taken while the guest was
// frozen, and a guest that is frozen in the end stands in the report and in the notes.
type outcome struct {
	atRest, taken, notThawed bool
	why                      string
}

// hostile are agents that do not do as they should.
var hostile = map[string]struct {
	do   func(f *fakeAgent)
	want outcome
}{
	"none": {func(*fakeAgent) {}, outcome{atRest: true, taken: true}},
	"hangs when synchronised": {func(f *fakeAgent) {
		f.instead[syncCommand] = func(c net.Conn, _ int) bool { f.hang(c); return true }
	}, outcome{why: "qemu-guest-agent"}},
	"hangs in the freeze, and then freezes": {func(f *fakeAgent) {
		f.instead[freeze] = func(c net.Conn, _ int) bool { f.sleep(40 * time.Second); f.do(freeze); return true }
	}, outcome{why: "come to rest within 30s"}},
	"hangs in the freeze for ever": {func(f *fakeAgent) {
		f.instead[freeze] = func(c net.Conn, _ int) bool { f.do(freeze); f.sleep(time.Hour); return true }
	}, outcome{notThawed: true, why: "come to rest within 30s"}},
	"answers the freeze too late": {func(f *fakeAgent) {
		f.instead[freeze] = func(c net.Conn, _ int) bool {
			f.sleep(31 * time.Second)
			f.say(c, "%s\n", f.do(freeze))
			return true
		}
	}, outcome{why: "come to rest within 30s"}},
	"hangs when asked for its status": {func(f *fakeAgent) {
		f.instead[status] = func(c net.Conn, n int) bool {
			if n == 2 {
				f.hang(c)
			}
			return n == 2
		}
	}, outcome{taken: true, why: "not known to have been frozen"}},
	"never tells its status": {func(f *fakeAgent) {
		f.instead[status] = func(c net.Conn, _ int) bool { f.hang(c); return true }
	}, outcome{why: "did not come to rest"}},
	"never tells its status once frozen": {func(f *fakeAgent) {
		f.instead[status] = func(c net.Conn, n int) bool {
			if n > 1 {
				f.hang(c)
			}
			return n > 1
		}
	}, outcome{taken: true, notThawed: true, why: "not known"}},
	"hangs in the first thaw": {func(f *fakeAgent) {
		f.instead[thaw] = func(c net.Conn, n int) bool {
			if n == 1 {
				f.hang(c)
			}
			return n == 1
		}
	}, outcome{atRest: true, taken: true}},
	"never thaws": {func(f *fakeAgent) {
		f.instead[thaw] = func(c net.Conn, _ int) bool { f.say(c, "{\"return\": 2}\n"); return true }
	}, outcome{taken: true, notThawed: true, why: "still frozen"}},
	"answers the synchronisation of another": {func(f *fakeAgent) {
		f.instead[syncCommand] = func(c net.Conn, _ int) bool { f.say(c, "\xff{\"return\": 7}\n"); return false }
	}, outcome{atRest: true, taken: true}},
	"knows the wrong id only": {func(f *fakeAgent) {
		f.instead[syncCommand] = func(c net.Conn, _ int) bool { f.say(c, "\xff{\"return\": 7}\n"); return true }
	}, outcome{why: "does not synchronise"}},
	"says garbage": {func(f *fakeAgent) {
		f.instead[freeze] = func(c net.Conn, _ int) bool { f.do(freeze); f.say(c, "}{\x00\xfe\n"); return true }
	}, outcome{why: "is none"}},
	"says garbage without end": {func(f *fakeAgent) {
		f.instead[syncCommand] = func(c net.Conn, _ int) bool {
			for {
				if _, err := c.Write(make([]byte, 64<<10)); err != nil {
					return true
				}
			}
		}
	}, outcome{why: "without a delimiter"}},
	"says a line without end": {func(f *fakeAgent) {
		f.instead[freeze] = func(c net.Conn, _ int) bool {
			f.do(freeze)
			_, _ = c.Write(make([]byte, 2*maxLine))
			return true
		}
	}, outcome{why: "a line of more than"}},
	"says half a line": {func(f *fakeAgent) {
		f.instead[freeze] = func(c net.Conn, _ int) bool { f.do(freeze); f.say(c, "{\"return\":"); f.hang(c); return true }
	}, outcome{why: "come to rest within 30s"}},
	"says half a line and hangs up": {func(f *fakeAgent) {
		f.instead[freeze] = func(c net.Conn, _ int) bool { f.do(freeze); f.say(c, "{\"return\":"); _ = c.Close(); return true }
	}, outcome{why: "hung up"}},
	"freezes and reports an error": {func(f *fakeAgent) {
		f.instead[freeze] = func(c net.Conn, _ int) bool {
			f.do(freeze)
			f.say(c, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"failed to freeze /wal\"}}\n")
			return true
		}
	}, outcome{why: "failed to freeze /wal"}},
	"freezes nothing": {func(f *fakeAgent) { f.systems = 0 }, outcome{why: "no file system"}},
	"says both": {func(f *fakeAgent) {
		f.instead[freeze] = func(c net.Conn, _ int) bool {
			f.do(freeze)
			f.say(c, "{\"return\": 2, \"error\": {\"class\": \"x\"}}\n")
			return true
		}
	}, outcome{why: "is none"}},
	"dies between freeze and thaw": {func(f *fakeAgent) {
		f.instead[freeze] = func(c net.Conn, _ int) bool { f.say(c, "%s\n", f.do(freeze)); _ = c.Close(); return true }
	}, outcome{taken: true, why: "not known to have been frozen"}},
	"thaws by itself": {func(f *fakeAgent) {
		f.instead[status] = func(_ net.Conn, n int) bool { f.do(thaw); return n < 0 }
	}, outcome{taken: true, why: "was thawed before"}},
	"was thawed by another, unnoticed": {func(f *fakeAgent) {
		f.instead[thaw] = func(c net.Conn, _ int) bool { f.do(thaw); f.say(c, "{\"return\": 1}\n"); return true }
	}, outcome{taken: true, why: "something else had thawed"}},
	"reports that its thaw failed": {func(f *fakeAgent) {
		f.instead[thaw] = func(c net.Conn, _ int) bool {
			f.do(thaw)
			f.say(c, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"fsfreeze is limited up to 10 seconds\"}}\n")
			return true
		}
	}, outcome{taken: true, why: "limited up to 10 seconds"}},
	"is in a status that there is not": {func(f *fakeAgent) {
		f.instead[status] = func(c net.Conn, n int) bool {
			if n == 2 {
				f.say(c, "{\"return\": \"tepid\"}\n")
			}
			return n == 2
		}
	}, outcome{taken: true, why: "tepid"}},
}

// TestAGuestThatSomebodyElseFroze stays as it is.
func TestAGuestThatSomebodyElseFroze(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.frozen = true
		notes, err := NewNotes(t.TempDir())
		require.NoError(t, err)
		c := Cut{Group: "g", Guests: []Named{{"web", Spec{}}}, Notes: notes, open: func(Named) Guest { return f.guest() }}
		r, err := c.Run(context.Background(), func(context.Context) (record.LSN, error) { return 1, nil })
		require.NoError(t, err)
		require.False(t, r.Taken || r.AtRest)
		require.Contains(t, r.Reason(), "frozen already")
		require.True(t, f.isFrozen())
		require.NoError(t, r.Problem())
		f.stop()
	})
}

// TestANoteThatCanNotBeTakenBack: the record was taken at rest, and says so; the note is told.
func TestANoteThatCanNotBeTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		dir := filepath.Join(t.TempDir(), "notes")
		notes, err := NewNotes(dir)
		require.NoError(t, err)
		c := Cut{Group: "g", Guests: []Named{{"web", Spec{}}}, Notes: notes, open: func(Named) Guest { return f.guest() }}
		r, err := c.Run(context.Background(), func(context.Context) (record.LSN, error) {
			// What stands in the way of the note's end: a directory in its place that is not empty.
			return 1, errors.Join(os.Remove(dir+"/g.json"), os.MkdirAll(dir+"/g.json/x", 0o700))
		})
		require.NoError(t, err)
		require.True(t, r.Taken && r.AtRest, "%+v", r)
		require.ErrorContains(t, r.Problem(), "g.json")
		f.stop()
	})
}

func TestHostileAgents(t *testing.T) {
	for name, h := range hostile {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				h.do(f)
				notes, err := NewNotes(t.TempDir())
				require.NoError(t, err)
				frozenAtTake, noted := false, 0
				c := Cut{Group: "g", Label: "l", Guests: []Named{{"web", Spec{Agent: "/nowhere"}}}, Notes: notes, open: func(Named) Guest { return f.guest() }}
				r, err := c.Run(context.Background(), func(context.Context) (record.LSN, error) {
					left, err := notes.Left()
					noted, frozenAtTake = len(left), f.isFrozen()
					return 7, err
				})
				require.NoError(t, err)
				require.True(t, !r.Taken || noted == 1, "noted before it is frozen")
				require.Equal(t, h.want.taken, r.Taken, "%+v", r)
				require.Equal(t, h.want.atRest, r.AtRest, "%+v", r)
				require.Equal(t, h.want.notThawed, len(r.NotThawed) > 0, "%+v", r)
				require.Contains(t, r.Reason(), h.want.why)
				require.True(t, !r.AtRest || frozenAtTake, "called at rest, and was not")
				left, err := notes.Left()
				require.NoError(t, err)
				if f.isFrozen() || len(r.NotThawed) > 0 {
					require.NotEmpty(t, r.NotThawed, "frozen, and nobody is told")
					require.Error(t, r.Problem())
					require.Len(t, left, 1)
					require.Contains(t, left[0].Guests, "web")
				} else {
					require.NoError(t, r.Problem())
					require.Empty(t, left)
				}
				f.stop()
			})
		})
	}
}

// TestASlowRecordDoesNotKeepTheGuestFrozen: the guest is thawed at the limit, then the record is waited for.
func TestASlowRecordDoesNotKeepTheGuestFrozen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		notes, err := NewNotes(t.TempDir())
		require.NoError(t, err)
		frozen := true
		c := Cut{Group: "g", Guests: []Named{{"web", Spec{}}}, Limit: time.Second, Notes: notes, open: func(Named) Guest { return f.guest() }}
		r, err := c.Run(context.Background(), func(context.Context) (record.LSN, error) {
			time.Sleep(time.Minute)
			frozen = f.isFrozen()
			return 9, nil
		})
		require.NoError(t, err)
		require.False(t, frozen)
		require.True(t, r.Taken)
		require.EqualValues(t, 9, r.LSN)
		require.False(t, r.AtRest)
		require.Contains(t, r.Reason(), "may be frozen for 1s")
		require.Equal(t, time.Second, r.Frozen)
		f.stop()
	})
}

// TestSlowHooksOfAGuest: what its own hooks take is not the time that it is frozen.
func TestSlowHooksOfAGuest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow, quick := newFake(t), newFake(t)
		slow.instead[freeze] = func(net.Conn, int) bool { slow.sleep(20 * time.Second); return false }
		notes, err := NewNotes(t.TempDir())
		require.NoError(t, err)
		cut := func(guests ...*fakeAgent) Report {
			c := Cut{Group: "g", Notes: notes}
			for i := range guests {
				c.Guests = append(c.Guests, Named{Name: string(rune('0' + i))})
			}
			c.open = func(n Named) Guest { return guests[n.Name[0]-'0'].guest() }
			r, err := c.Run(context.Background(), func(context.Context) (record.LSN, error) {
				time.Sleep(time.Millisecond)
				return 1, nil
			})
			require.NoError(t, err)
			require.False(t, slow.isFrozen() || quick.isFrozen())
			return r
		}
		r := cut(slow)
		require.True(t, r.AtRest, "%+v", r)
		require.Equal(t, 20*time.Second, r.Rested)
		require.Equal(t, time.Millisecond, r.Frozen)
		r = cut(quick, slow)
		require.False(t, r.Taken, "one would be frozen for as long as the other takes")
		require.Contains(t, r.Reason(), "may be frozen for 2s")
		slow.stop()
		quick.stop()
	})
}

// TestOneGuestOfManyThatDoesNotFreeze: none stays frozen, and no record is taken.
func TestOneGuestOfManyThatDoesNotFreeze(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		guests := map[string]*fakeAgent{"a": newFake(t), "b": newFake(t), "c": newFake(t)}
		guests["b"].systems = 0
		notes, err := NewNotes(t.TempDir())
		require.NoError(t, err)
		c := Cut{Group: "g", Guests: []Named{{"a", Spec{}}, {"b", Spec{}}, {"c", Spec{}}}, Notes: notes, open: func(n Named) Guest { return guests[n.Name].guest() }}
		r, err := c.Run(context.Background(), func(context.Context) (record.LSN, error) { return 1, nil })
		require.NoError(t, err)
		require.False(t, r.AtRest || r.Taken)
		require.Contains(t, r.Reason(), "guest b")
		for _, f := range guests {
			require.False(t, f.isFrozen())
			require.Contains(t, f.asked, thaw)
			f.stop()
		}
	})
}

func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "hook")
	require.NoError(t, os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o700))
	return path
}

// TestHooks: in order, undone in the other order, whatever fails; by their arguments, in an environment that says what for.
func TestHooks(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	say := script(t, `echo "$1 $TIDEMARK_GROUP $TIDEMARK_LABEL $TIDEMARK_PHASE ${TIDEMARK_LSN-none}" >>"$2"; exit ${3-0}`)
	fails := script(t, "echo what is wrong; exit 3")
	hangs := script(t, "sleep 1000 & sleep 1000")
	for name, c := range map[string]struct {
		hooks        []Hook
		log          string
		atRest       bool
		why, problem string
	}{
		"well": {[]Hook{{Before: []string{say, "a b", log}, After: []string{say, "c", log}}, {After: []string{say, "d", log}}},
			"a b g l before none\nd g l after 5\nc g l after 5\n", true, "", ""},
		"before fails": {[]Hook{{Before: []string{say, "a", log}, After: []string{say, "b", log}}, {Before: []string{fails}, After: []string{say, "c", log}},
			{Before: []string{say, "never", log}, After: []string{say, "never", log}}},
			"a g l before none\nc g l after none\nb g l after none\n", false, "what is wrong", ""},
		"after fails": {[]Hook{{Before: []string{say, "a", log}, After: []string{fails}}}, "a g l before none\n", true, "", "exit status 3"},
		"hangs": {[]Hook{{Before: []string{hangs}, Timeout: 50 * time.Millisecond, After: []string{say, "b", log}}},
			"b g l after none\n", false, "killed after 50ms", ""},
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, os.WriteFile(log, nil, 0o600))
			notes, err := NewNotes(filepath.Join(dir, "notes"))
			require.NoError(t, err)
			cut := Cut{Group: "g", Label: "l", Hooks: c.hooks, Notes: notes}
			r, err := cut.Run(context.Background(), func(context.Context) (record.LSN, error) { return 5, nil })
			require.NoError(t, err)
			require.Equal(t, c.atRest, r.AtRest, "%+v", r)
			require.Equal(t, c.atRest, r.Taken)
			require.Contains(t, r.Reason(), c.why)
			if c.problem == "" {
				require.NoError(t, r.Problem())
			} else {
				require.ErrorContains(t, r.Problem(), c.problem)
			}
			b, err := os.ReadFile(log)
			require.NoError(t, err)
			require.Equal(t, c.log, string(b))
			left, err := notes.Left()
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
}

func TestHooksThatCanNotRun(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "plain")
	require.NoError(t, os.WriteFile(plain, nil, 0o600))
	for want, h := range map[string]Hook{
		"chmod +x":             {Before: []string{plain}},
		"does not exist":       {After: []string{plain + "x"}},
		"full path":            {After: []string{"true"}},
		"neither before nor":   {},
		"must not be negative": {Before: []string{"/bin/true"}, Timeout: -1},
	} {
		require.ErrorContains(t, h.Validate(), want)
	}
	require.NoError(t, Hook{Before: []string{"/bin/true"}}.Validate())
}

// TestWhatADeadDaemonLeft: its guest is frozen, its hook was begun.
func TestWhatADeadDaemonLeft(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	notes, err := NewNotes(filepath.Join(dir, "notes"))
	require.NoError(t, err)
	sock := filepath.Join(dir, "sock")
	note := Note{Group: "g", Label: "l", Guests: map[string]Spec{"web": {Agent: sock}},
		After: []Hook{{After: []string{script(t, `echo $TIDEMARK_LABEL >>`+log)}}}}
	require.NoError(t, notes.put(note))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "notes", "other.json"), []byte("{"), 0o600))
	left, err := notes.Left()
	require.ErrorContains(t, err, "other.json")
	require.Len(t, left, 1)
	r := notes.Wake(context.Background(), left[0])
	require.ErrorContains(t, r.Problem(), "may still be frozen")
	left, err = notes.Left()
	require.Error(t, err)
	require.Len(t, left, 1, "its agent does not answer: it stays noted")
	require.Empty(t, left[0].After, "the hook has run")

	f := newFake(t)
	f.frozen = true
	l, err := net.Listen("unix", sock)
	require.NoError(t, err)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				f.stop()
				return
			}
			f.accept <- c
		}
	}()
	r = notes.Wake(context.Background(), left[0])
	require.NoError(t, r.Problem())
	require.False(t, f.isFrozen())
	left, _ = notes.Left()
	require.Empty(t, left)
	require.NoError(t, l.Close())
	<-f.done
	b, err := os.ReadFile(log)
	require.NoError(t, err)
	require.Equal(t, "l\n", string(b))
}

func TestParseSpec(t *testing.T) {
	s, err := ParseSpec("agent:/run/x:y")
	require.NoError(t, err)
	require.Equal(t, Spec{Agent: "/run/x:y"}, s)
	require.Equal(t, "agent:/run/x:y", s.String())
	s, err = ParseSpec("libvirt:web01")
	require.NoError(t, err)
	require.Equal(t, "libvirt:web01", s.String())
	for _, bad := range []string{"", "agent", "agent:", "qemu:x"} {
		_, err := ParseSpec(bad)
		require.ErrorContains(t, err, "expected agent:PATH")
	}
	require.Error(t, Spec{}.Validate())
	require.Error(t, Spec{Agent: "a", Libvirt: "b"}.Validate())
	require.Error(t, Spec{Agent: "a", Socket: "b"}.Validate())
}

var errTake = errors.New("no room")

func TestARecordThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		notes, err := NewNotes(t.TempDir())
		require.NoError(t, err)
		c := Cut{Group: "g", Guests: []Named{{"web", Spec{}}}, Notes: notes, open: func(Named) Guest { return f.guest() }}
		r, err := c.Run(context.Background(), func(context.Context) (record.LSN, error) { return 0, errTake })
		require.ErrorIs(t, err, errTake)
		require.False(t, r.Taken)
		require.False(t, f.isFrozen())
		f.stop()
	})
}
