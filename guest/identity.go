package guest

import (
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/beevik/etree"
)

// Identity says what a copy of a domain is to be.
type Identity struct {
	Name string // of the copy
	// Disks are where the copy's disks are, by the target's name (vda): a file or block device.
	// A disk with an empty path is left out.
	Disks map[string]string
}

// ErrIdentity is wrapped when it is the identity asked for that can not be.
var ErrIdentity = errors.New("this can not be the copy")

// NewIdentity makes, of a libvirt domain's XML, that of a copy which can run beside the original: with another
// name, UUID, VM generation id and MAC addresses, with its own disks, and without what only one of
// the two can have. What it had to leave out is in left.
func NewIdentity(xml []byte, id Identity) (out []byte, left []string, err error) {
	doc := etree.NewDocument()
	if err := doc.ReadFromBytes(xml); err != nil {
		return nil, nil, fmt.Errorf("the definition is not XML: %w: a new identity can be given to a libvirt domain's definition only", err)
	}
	root := doc.Root()
	if root == nil || root.Tag != "domain" {
		return nil, nil, fmt.Errorf("the definition is not a libvirt domain's: a new identity can be given to no other")
	}
	name := text(root, "name")
	if id.Name == name || id.Name == "" {
		return nil, nil, fmt.Errorf("%w: the domain is called %q, and its copy would be %q: choose another name", ErrIdentity, name, id.Name)
	}
	root.RemoveAttr("id")
	set(root, "name", id.Name)
	uuid := newUUID()
	set(root, "uuid", uuid)
	for _, e := range root.FindElements("./genid") {
		e.SetText(newUUID())
	}
	for _, e := range root.FindElements("./sysinfo/system/entry[@name='uuid']") {
		e.SetText(uuid) // libvirt wants the two equal
	}
	c := copier{id: id, used: map[string]bool{}}
	if err := c.disks(root); err != nil {
		return nil, nil, err
	}
	c.devices(root)
	doc.Indent(2)
	out, err = doc.WriteToBytes()
	return out, c.left, err
}

func text(e *etree.Element, path string) string {
	if f := e.FindElement("./" + path); f != nil {
		return strings.TrimSpace(f.Text())
	}
	return ""
}

// attr is an attribute of a child that may not be there.
func attr(e *etree.Element, child, name string) string {
	if c := e.SelectElement(child); c != nil {
		return c.SelectAttrValue(name, "")
	}
	return ""
}

func set(e *etree.Element, tag, value string) {
	f := e.SelectElement(tag)
	if f == nil {
		f = e.CreateElement(tag)
	}
	f.SetText(value)
}

// newUUID is a random one, RFC 9562 version 4.
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// newMAC is a random address with QEMU's prefix.
func newMAC() string {
	var b [3]byte
	_, _ = rand.Read(b[:]) // it never fails
	return fmt.Sprintf("52:54:00:%02x:%02x:%02x", b[0], b[1], b[2])
}

type copier struct {
	id   Identity
	used map[string]bool // disks that were asked for and found
	left []string
}

// disks points each disk at its copy. A copy that shared a disk with the original would destroy it.
func (c *copier) disks(root *etree.Element) error {
	var missing []string
	for _, d := range root.FindElements("./devices/disk") {
		if device := d.SelectAttrValue("device", "disk"); device != "disk" && device != "lun" {
			if device == "floppy" {
				d.Parent().RemoveChild(d) // a CD is read-only and may be shared, this is not
				c.left = append(c.left, "a floppy")
			}
			continue
		}
		target := attr(d, "target", "dev")
		path, ok := c.id.Disks[target]
		c.used[target] = true
		switch {
		case !ok:
			missing = append(missing, target)
		case path == "":
			d.Parent().RemoveChild(d)
			c.left = append(c.left, "disk "+target)
		default:
			point(d, path)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: no copy is named of disk %s: give --disk %s=FILE for each, or --disk %s= to leave it out",
			ErrIdentity, strings.Join(missing, ", "), missing[0], missing[0])
	}
	for _, target := range slices.Sorted(maps.Keys(c.id.Disks)) {
		if !c.used[target] {
			return fmt.Errorf("%w: the domain has no disk %s", ErrIdentity, target)
		}
	}
	return nil
}

// point gives a disk another source.
func point(d *etree.Element, path string) {
	for _, tag := range []string{"source", "backingStore", "mirror", "auth", "encryption"} {
		for _, e := range d.SelectElements(tag) {
			d.RemoveChild(e)
		}
	}
	kind, key := "file", "file"
	if strings.HasPrefix(path, "/dev/") {
		kind, key = "block", "dev"
	}
	d.CreateAttr("type", kind)
	d.CreateElement("source").CreateAttr(key, path)
	format := "raw"
	if strings.HasSuffix(path, ".qcow2") {
		format = "qcow2"
	}
	driver := d.SelectElement("driver")
	if driver == nil {
		driver = d.CreateElement("driver")
		driver.CreateAttr("name", "qemu")
	}
	driver.CreateAttr("type", format)
}

// devices changes what two running domains can not have both.
func (c *copier) devices(root *etree.Element) {
	for _, nic := range root.FindElements("./devices/interface") {
		mac := nic.SelectElement("mac")
		if mac == nil {
			mac = nic.CreateElement("mac")
		}
		mac.CreateAttr("address", newMAC())
		for _, e := range nic.SelectElements("target") {
			nic.RemoveChild(e) // the host's end of it has a name too
		}
	}
	for _, ch := range root.FindElements("./devices/channel") {
		src := ch.SelectElement("source")
		switch {
		case src == nil:
		case src.SelectAttrValue("mode", "") == "connect":
			ch.Parent().RemoveChild(ch) // whoever listens would take the copy for the original
			c.left = append(c.left, "channel "+attr(ch, "target", "name"))
		default:
			ch.RemoveChild(src)
		}
	}
	for _, tag := range []string{"serial", "parallel", "console"} {
		for _, e := range root.FindElements("./devices/" + tag) {
			if kind := e.SelectAttrValue("type", "pty"); kind == "pty" || kind == "null" {
				continue
			}
			e.CreateAttr("type", "pty") // the host's end was a file, a socket or a device
			for _, tag := range []string{"source", "log", "protocol"} {
				for _, s := range e.SelectElements(tag) {
					e.RemoveChild(s)
				}
			}
			c.left = append(c.left, "where the "+tag+" port leads to: it is a pty of the copy's own")
		}
	}
	for _, v := range root.FindElements("./devices/vsock/cid") {
		v.RemoveAttr("address")
		v.CreateAttr("auto", "yes")
	}
	for _, g := range root.FindElements("./devices/graphics") {
		g.RemoveAttr("port")
		g.RemoveAttr("tlsPort")
		g.CreateAttr("autoport", "yes")
	}
	for _, n := range root.FindElements("./os/nvram") {
		n.SetText("") // libvirt makes one of the template
		n.RemoveAttr("type")
		for _, e := range n.SelectElements("source") {
			n.RemoveChild(e)
		}
		c.left = append(c.left, "the firmware's variables (nvram): the copy begins with those of the template")
	}
	for _, tag := range []string{"hostdev", "shmem"} {
		for _, h := range root.FindElements("./devices/" + tag) {
			h.Parent().RemoveChild(h)
			c.left = append(c.left, "a device of the host ("+tag+"): one guest at a time can have it")
		}
	}
	for _, b := range root.FindElements("./devices/tpm/backend[@type='passthrough']") {
		tpm := b.Parent()
		tpm.Parent().RemoveChild(tpm)
		c.left = append(c.left, "the host's TPM")
	}
}
