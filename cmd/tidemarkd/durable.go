package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// writeDurable makes a file have a content, durably, or leaves it as it was.
func writeDurable(path string, b []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func writeNote(path string, note any) error {
	b, err := json.MarshalIndent(note, "", "  ")
	if err == nil {
		err = writeDurable(path, append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("note %s: %w", path, err)
	}
	return nil
}

func readNote(path string, note any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, note); err != nil {
		return fmt.Errorf("note %s: %w", path, err)
	}
	return nil
}

// mkdirDurable makes a directory, and those above it, so that they stay.
func mkdirDurable(path string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	above := filepath.Dir(path)
	if above != path {
		if err := mkdirDurable(above); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return syncDir(above)
}

// removeDurable removes a file so that it stays removed.
func removeDurable(path string) error {
	return errors.Join(os.Remove(path), syncDir(filepath.Dir(path)))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
