// Package tidemark holds nothing but the test of the house's rules: which
// room may import what, and that each says what it promises. The programs are
// under cmd; docs/ has what they do.
package tidemark
