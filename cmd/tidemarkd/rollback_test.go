package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/nbd/client"
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

// TestAMixIsNotServed: a rollback that broke off in the midst of a disk is not ended by one to a point before that disk was there.
func TestAMixIsNotServed(t *testing.T) {
	d := &served{t: t, dir: t.TempDir()}
	d.raw("a", 8<<20)
	d.raw("b", 8<<20)
	d.configure("groups:\n  web01:\n    disks: {vda: {backing: %DIR/a}}\n")
	d.start()
	d.scribble("web01/vda", 1, 20)
	d.ok("mark", "web01", "early")
	d.scribble("web01/vda", 9, 3)
	d.configure("groups:\n  web01:\n    disks: {vda: {backing: %DIR/a}, vdb: {backing: %DIR/b}}\n")
	d.ok("reload")
	d.scribble("web01/vdb", 2, 100)
	d.ok("mark", "web01", "one")
	d.scribble("web01/vdb", 3, 100)
	one := d.bytesOf("web01/vdb@one")
	// Half of the disk is written, and the note that is left can not be followed.
	c := d.dial("web01/vdb")
	require.NoError(t, c.WriteAt(one[:4<<20], 0, false))
	require.NoError(t, c.Close())
	for _, note := range []string{`"version": 1, "disks": ["vda", "vdb"]`, `"version": 99`, `"version": 1`, ""} {
		d.stop()
		require.NoError(t, os.WriteFile(d.path("state/rollback/web01.json"), []byte(`{`+note+`, "group": "web01", "point": "one", "lsn": 1099511627776, "before": "x", "before_lsn": 1099511627776}`), 0o600))
		d.start()
		out, code := d.tidemark("rollback", "web01", "--to", "early")
		require.Equal(t, 2, code, out)
		require.Contains(t, out, "disk vdb of group web01 may be a mix")
		_, err := client.Dial(context.Background(), "unix", d.sock(), "web01/vdb", nil)
		require.Error(t, err, "it is not served")
	}
	d.ok("rollback", "web01", "--to", "one") // though the note can not be read at all
	require.True(t, bytes.Equal(one, d.bytesOf("web01/vdb")))

	// One that has left the group meanwhile is given up by name only.
	d.stop()
	require.NoError(t, os.WriteFile(d.path("state/rollback/web01.json"), []byte(`{"version": 1, "group": "web01", "point": "one", "lsn": 1099511627776, "disks": ["vda", "vdb"], "before": "x", "before_lsn": 1099511627776}`), 0o600))
	d.configure("groups:\n  web01:\n    disks: {vda: {backing: %DIR/a}}\n")
	d.start()
	out, code := d.tidemark("rollback", "web01", "--to", "early")
	require.Equal(t, 2, code, out)
	require.Contains(t, out, "disk vdb, which was in group web01, may be a mix")
	d.ok("rollback", "web01", "--to", "early", "--force")
}
