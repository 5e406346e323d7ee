package guestfs

import (
	"fmt"
	"strconv"
)

// The text of LVM2's metadata: lib/config/config.c. Sections hold keys with values: strings, whole numbers, lists of both, sections.
// Comments run from # to the end of the line.

type section map[string]any // string, int64, []any, section

const (
	// maxDepth bounds how deep sections are in each other.
	maxDepth = 16
	// maxValues bounds what a text may hold.
	maxValues = 1 << 20
)

type confParser struct {
	b      []byte
	at     int
	values int
}

func parseConf(b []byte) (section, error) {
	p := &confParser{b: b}
	s, err := p.section(0)
	if err != nil {
		return nil, fmt.Errorf("%w: metadata at byte %d: %w", ErrLayout, p.at, err)
	}
	return s, nil
}

// space passes over blanks and comments, and reports whether anything follows.
func (p *confParser) space() bool {
	for p.at < len(p.b) {
		switch p.b[p.at] {
		case '#':
			for p.at < len(p.b) && p.b[p.at] != '\n' {
				p.at++
			}
		case ' ', '\t', '\n', '\r', 0:
			p.at++
		default:
			return true
		}
	}
	return false
}

// section reads keys up to the closing brace, or to the end.
func (p *confParser) section(depth int) (section, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("sections are more than %d deep", maxDepth)
	}
	s := section{}
	for {
		if !p.space() {
			if depth > 0 {
				return nil, fmt.Errorf("a section does not end")
			}
			return s, nil
		}
		if p.b[p.at] == '}' {
			if depth == 0 {
				return nil, fmt.Errorf("a section ends that never began")
			}
			p.at++
			return s, nil
		}
		key, err := p.key()
		if err != nil {
			return nil, err
		}
		if s[key], err = p.member(depth); err != nil {
			return nil, err
		}
		if p.values++; p.values > maxValues {
			return nil, fmt.Errorf("more than %d values", maxValues)
		}
	}
}

// member reads what follows a key: = and a value, or a section.
func (p *confParser) member(depth int) (any, error) {
	if !p.space() {
		return nil, fmt.Errorf("a key without a value")
	}
	switch p.b[p.at] {
	case '{':
		p.at++
		return p.section(depth + 1)
	case '=':
		p.at++
		return p.value()
	}
	return nil, fmt.Errorf("a key is followed by %q", p.b[p.at])
}

func (p *confParser) key() (string, error) {
	from := p.at
	for p.at < len(p.b) {
		c := p.b[p.at]
		if c == '=' || c == '{' || c == '}' || c == ' ' || c == '\t' || c == '\n' || c == '#' {
			break
		}
		p.at++
	}
	if p.at == from {
		return "", fmt.Errorf("a key is expected, not %q", p.b[p.at])
	}
	return string(p.b[from:p.at]), nil
}

func (p *confParser) value() (any, error) {
	if !p.space() {
		return nil, fmt.Errorf("a key without a value")
	}
	if p.b[p.at] != '[' {
		return p.scalar()
	}
	p.at++
	list := []any{}
	for {
		if !p.space() {
			return nil, fmt.Errorf("a list does not end")
		}
		switch p.b[p.at] {
		case ']':
			p.at++
			return list, nil
		case ',':
			p.at++
			continue
		}
		v, err := p.scalar()
		if err != nil {
			return nil, err
		}
		list = append(list, v)
		if p.values++; p.values > maxValues {
			return nil, fmt.Errorf("more than %d values", maxValues)
		}
	}
}

func (p *confParser) scalar() (any, error) {
	if p.b[p.at] == '"' {
		return p.quoted()
	}
	from := p.at
	for p.at < len(p.b) && (p.b[p.at] >= '0' && p.b[p.at] <= '9' || p.b[p.at] == '-' || p.b[p.at] == '.') {
		p.at++
	}
	word := string(p.b[from:p.at])
	n, err := strconv.ParseInt(word, 10, 64)
	if err != nil {
		if _, ferr := strconv.ParseFloat(word, 64); ferr == nil {
			return word, nil // of no use here
		}
		return nil, fmt.Errorf("%q is no number", word)
	}
	return n, nil
}

func (p *confParser) quoted() (string, error) {
	var s []byte
	for p.at++; p.at < len(p.b); p.at++ {
		switch c := p.b[p.at]; c {
		case '"':
			p.at++
			return string(s), nil
		case '\\':
			if p.at++; p.at == len(p.b) {
				return "", fmt.Errorf("a string does not end")
			}
			s = append(s, p.b[p.at])
		default:
			s = append(s, c)
		}
	}
	return "", fmt.Errorf("a string does not end")
}
