package wan

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestALink(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("takes root: network namespaces")
	}
	if _, err := exec.LookPath("ping"); err != nil {
		t.Skip("this machine has no ping: run make deps")
	}
	l, err := New("tmwan", Shape{Delay: 30 * time.Millisecond})
	require.NoError(t, err)
	ping := func() (string, error) {
		out, err := l.Command(t.Context(), 0, "ping", "-q", "-c", "3", "-i", "0.2", "-W", "1", AddressB).CombinedOutput()
		return string(out), err
	}
	out, err := ping()
	require.NoError(t, err, out)
	_, rest, ok := strings.Cut(out, "rtt min/avg/max/mdev = ")
	require.True(t, ok, out)
	least, err := strconv.ParseFloat(strings.Split(rest, "/")[0], 64)
	require.NoError(t, err)
	require.GreaterOrEqual(t, least, 60.0)
	l.Cut(true)
	_, err = ping()
	require.Error(t, err)
	l.Cut(false)
	l.Shape(Shape{Loss: 1})
	_, err = ping()
	require.Error(t, err)
	require.NoError(t, l.Close())
	again, err := New("tmwan", Shape{})
	require.NoError(t, err)
	require.NoError(t, again.Close())
}
