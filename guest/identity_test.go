package guest

import (
	"strings"
	"testing"

	"github.com/beevik/etree"
	"github.com/stretchr/testify/require"
)

const web01 = `<domain type='kvm' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web01</name>
  <uuid>11111111-1111-4111-8111-111111111111</uuid>
  <genid>22222222-2222-4222-8222-222222222222</genid>
  <memory unit='KiB'>1048576</memory>
  <sysinfo type='smbios'><system><entry name='uuid'>11111111-1111-4111-8111-111111111111</entry><entry name='serial'>s</entry></system></sysinfo>
  <os><type arch='x86_64'>hvm</type><nvram template='/t.fd'>/var/web01.fd</nvram></os>
  <devices>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw' discard='unmap'/>
      <source protocol='nbd' name='web01/vda'><host transport='unix' socket='/run/tidemark/nbd.sock'/></source>
      <target dev='vda' bus='virtio'/><serial>disk-1</serial>
    </disk>
    <disk type='block' device='disk'><source dev='/dev/vg/web01'/><backingStore/><target dev='vdb' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/></disk>
    <interface type='bridge'><mac address='52:54:00:11:22:33'/><target dev='vnet0'/><model type='virtio'/></interface>
    <channel type='unix'><source mode='bind' path='/x/agent'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='unix'><source mode='connect' path='/x/port'/><target type='virtio' name='org.tidemark.0'/></channel>
    <serial type='file'><source path='/x/console'/><target port='0'/></serial>
    <vsock model='virtio'><cid auto='no' address='7'/></vsock>
    <hostdev mode='subsystem' type='usb'/>
    <disk type='file' device='floppy'><source file='/x/floppy'/><target dev='fda'/></disk>
    <graphics type='vnc' port='5901' autoport='no'/>
  </devices>
  <qemu:commandline><qemu:arg value='-foo'/></qemu:commandline>
</domain>`

func TestNewIdentity(t *testing.T) {
	out, left, err := NewIdentity([]byte(web01), Identity{Name: "web01-copy", Disks: map[string]string{"vda": "/r/vda.qcow2", "vdb": "/dev/vg/copy"}})
	require.NoError(t, err)
	doc := etree.NewDocument()
	require.NoError(t, doc.ReadFromBytes(out))
	at := func(path string) string {
		e := doc.FindElement(path)
		require.NotNil(t, e, path)
		return e.Text()
	}
	require.Equal(t, "web01-copy", at("/domain/name"))
	require.Equal(t, at("/domain/uuid"), at("/domain/sysinfo/system/entry[@name='uuid']"))
	require.Regexp(t, `^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`, at("/domain/uuid"))
	require.NotEqual(t, "22222222-2222-4222-8222-222222222222", at("/domain/genid"))
	for _, gone := range []string{"11111111-1111", "22222222-2222", "52:54:00:11:22:33", "nbd.sock", "/dev/vg/web01", "/var/web01.fd", "vnet0", "/x/", "5901", "id=\"3\"", "hostdev", "address=\"7\"", "fda"} {
		require.NotContains(t, string(out), gone)
	}
	for _, kept := range []string{"<memory unit=\"KiB\">1048576</memory>", "<qemu:arg value=\"-foo\"/>", "xmlns:qemu=", "<serial>disk-1</serial>", "discard=\"unmap\"", "/iso", "org.qemu.guest_agent.0"} {
		require.Contains(t, string(out), kept)
	}
	vda := doc.FindElement("//disk[target]/target[@dev='vda']").Parent()
	require.Equal(t, "file", vda.SelectAttrValue("type", ""))
	require.Equal(t, "/r/vda.qcow2", vda.SelectElement("source").SelectAttrValue("file", ""))
	require.Equal(t, "qcow2", vda.SelectElement("driver").SelectAttrValue("type", ""))
	vdb := doc.FindElement("//disk[target]/target[@dev='vdb']").Parent()
	require.Equal(t, "/dev/vg/copy", vdb.SelectElement("source").SelectAttrValue("dev", ""))
	require.Equal(t, "raw", vdb.SelectElement("driver").SelectAttrValue("type", ""))
	require.Len(t, left, 5, "%q", left)

	out, left, err = NewIdentity([]byte(web01), Identity{Name: "other", Disks: map[string]string{"vda": "/r/a", "vdb": ""}})
	require.NoError(t, err)
	require.NotContains(t, string(out), "vdb")
	require.Contains(t, left, "disk vdb")
	require.Contains(t, string(out), "<name>other</name>")
}

func TestIdentitiesThatCanNotBe(t *testing.T) {
	disks := map[string]string{"vda": "/r/a", "vdb": "/r/b"}
	for _, c := range []struct {
		xml  string
		id   Identity
		want string
	}{
		{"boot: order=scsi0\ncores: 2\n", Identity{Name: "x"}, "not a libvirt domain's"},
		{"<domain><name>", Identity{}, "not XML"},
		{"<network/>", Identity{}, "not a libvirt domain's"},
		{"", Identity{}, "not a libvirt domain's"},
		{web01, Identity{Name: "web01", Disks: disks}, "choose another name"},
		{web01, Identity{Name: "x", Disks: map[string]string{"vda": "/r/a"}}, "no copy is named of disk vdb"},
		{web01, Identity{Name: "x", Disks: map[string]string{"vda": "/r/a", "vdb": "", "vdz": "/z"}}, "has no disk vdz"},
		{strings.Replace(web01, "<target type='virtio' name='org.tidemark.0'/>", "", 1), Identity{Name: "x", Disks: disks}, ""},
		{web01, Identity{Disks: disks}, "choose another name"},
	} {
		_, _, err := NewIdentity([]byte(c.xml), c.id)
		if c.want == "" {
			require.NoError(t, err)
		} else {
			require.ErrorContains(t, err, c.want)
		}
	}
}
