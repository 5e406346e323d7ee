package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

func (d *served) rollback(args ...string) api.RolledBack {
	d.t.Helper()
	var r api.RolledBack
	require.NoError(d.t, json.Unmarshal([]byte(d.ok(append([]string{"rollback", "web01", "--json"}, args...)...)), &r))
	return r
}

// TestRollbackAndReturn goes back and forth, with a client in the way at first.
func TestRollbackAndReturn(t *testing.T) {
	d := twoDisks(t, "")
	d.scribble("web01/vda", 1, 100)
	d.scribble("web01/vdb", 2, 20)
	d.ok("mark", "web01", "one")
	d.scribble("web01/vda", 3, 20)
	c := d.dial("web01/vda")
	require.NoError(t, c.Trim(1<<20, 4<<20))
	oneA, oneB := d.bytesOf("web01/vda@one"), d.bytesOf("web01/vdb@one")
	nowA := d.bytesOf("web01/vda")

	out, code := d.tidemark("rollback", "web01", "--to", "one")
	require.Equal(t, 9, code, out)
	require.Contains(t, out, "stop the guest first")
	require.True(t, bytes.Equal(nowA, d.bytesOf("web01/vda")))
	r := d.rollback("--to", "one", "--force")
	require.ErrorContains(t, c.WriteAt(make([]byte, 4096), 0, false), "the guest must be started anew")
	require.ErrorContains(t, c.ReadAt(make([]byte, 4096), 0), "the guest must be started anew")
	require.NoError(t, c.Close())
	require.True(t, bytes.Equal(oneA, d.bytesOf("web01/vda")))
	require.True(t, bytes.Equal(oneB, d.bytesOf("web01/vdb")))
	require.Zero(t, r.Disks[1].Written, "vdb did not differ")
	require.Less(t, r.Disks[0].Written, int64(20<<20))

	back := d.rollback("--to", r.Before)
	require.True(t, bytes.Equal(nowA, d.bytesOf("web01/vda")))
	require.Equal(t, r.Disks[0].Written, back.Disks[0].Written)
	require.True(t, bytes.Equal(oneA, d.bytesOf("web01/vda@"+back.Before)), "and the way back again")
	for _, bad := range []struct {
		code int
		args []string
	}{{2, []string{"web01"}}, {4, []string{"web01", "--to", "none"}}, {4, []string{"web09", "--to", "one"}}, {2, []string{"web01", "--to", "lsn:x"}}} {
		out, code := d.tidemark(append([]string{"rollback"}, bad.args...)...)
		require.Equal(t, bad.code, code, out)
	}
	d.stop()
	b, err := os.ReadFile(d.path("a"))
	require.NoError(t, err)
	require.True(t, bytes.Equal(nowA, b))
}

// TestARollbackIsFinished kills the daemon in the middle of rollbacks: nobody sees a mix, and the next start finishes it.
func TestARollbackIsFinished(t *testing.T) {
	d := twoDisks(t, "")
	d.scribble("web01/vda", 1, 1000)
	d.scribble("web01/vdb", 2, 50)
	d.ok("mark", "web01", "one")
	d.scribble("web01/vda", 3, 1000)
	d.scribble("web01/vdb", 4, 50)
	d.ok("mark", "web01", "two")
	want := map[string][]byte{}
	for _, p := range []string{"one", "two"} {
		want[p] = append(d.bytesOf("web01/vda@"+p), d.bytesOf("web01/vdb@"+p)...)
	}
	finished := 0
	for n := range 8 {
		point := []string{"one", "two"}[n%2]
		cmd := exec.Command(filepath.Join(binDir, "tidemark"), "rollback", "web01", "--to", point)
		cmd.Env = append(os.Environ(), "TIDEMARK_API=unix:"+d.path("api.sock"))
		require.NoError(t, cmd.Start())
		note := d.path("state/rollback/web01.json")
		require.Eventually(t, func() bool { _, err := os.Stat(note); return err == nil }, 10*time.Second, time.Millisecond)
		time.Sleep(time.Duration(n*4) * time.Millisecond)
		d.kill()
		_ = cmd.Wait()
		_, err := os.Stat(note)
		d.start()
		require.Eventually(t, func() bool { _, err := os.Stat(note); return err != nil }, 20*time.Second, 5*time.Millisecond)
		if err == nil {
			finished++
		}
		require.Eventually(t, func() bool { _, code := d.tidemark("mark", "web01", "m"+strings.Repeat("i", n+1)); return code == 0 }, 10*time.Second, 10*time.Millisecond)
		require.True(t, bytes.Equal(want[point], append(d.bytesOf("web01/vda"), d.bytesOf("web01/vdb")...)), "rollback %d to %s", n, point)
	}
	require.NotZero(t, finished, "no kill came in the middle")
}

// TestARollbackChecksFirst: what can not be read is found before anything is changed.
func TestARollbackChecksFirst(t *testing.T) {
	d := twoDisks(t, "")
	d.scribble("web01/vda", 1, 20)
	d.ok("mark", "web01", "one")
	d.scribble("web01/vda", 2, 20)
	d.stop()
	f, err := os.OpenFile(d.path("a"), os.O_RDWR, 0)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte("changed outside"), 60<<20)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	d.start()
	want := d.bytesOf("web01/vda")
	out, code := d.tidemark("rollback", "web01", "--to", "one")
	require.Equal(t, 1, code)
	require.Contains(t, out, "nothing was changed")
	require.NoFileExists(t, d.path("state/rollback/web01.json"))
	require.True(t, bytes.Equal(want, d.bytesOf("web01/vda")), "and it is served")
}
