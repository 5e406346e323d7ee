package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// definitionsEvery is how often definitions are looked at, beside before each marker with guests at rest.
const definitionsEvery = 30 * time.Second

// definitions are the ways to read what the group's guests are defined as, by name.
func (k *keeper) definitions() map[string]func(context.Context) ([]byte, error) {
	all := map[string]func(context.Context) ([]byte, error){}
	for name, d := range k.conf.Definitions {
		all[name] = func(context.Context) ([]byte, error) { return readDefinition(d.File) }
	}
	for name, g := range k.conf.Guests {
		if g.Libvirt != "" {
			all[name] = g.Spec().Definition
		}
	}
	return all
}

func readDefinition(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, record.MaxDefinition+1))
	if err == nil && len(b) > record.MaxDefinition {
		err = fmt.Errorf("%s: a definition has at most %d bytes", path, record.MaxDefinition)
	}
	return b, err
}

// watchDefinitions journals definitions as they change until ctx ends.
func (k *keeper) watchDefinitions(ctx context.Context) {
	k.dropDefinitions()
	t := time.NewTicker(definitionsEvery)
	defer t.Stop()
	for {
		k.define(ctx)
		k.concludeLeft()
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// dropDefinitions journals that what is configured no more is not in force any more.
func (k *keeper) dropDefinitions() {
	have, err := k.g.Definitions(k.g.Head())
	if err != nil {
		k.log.Warn("definitions", zap.Error(err))
		return
	}
	now := k.definitions()
	for _, d := range have {
		if _, ok := now[d.Name]; !ok {
			if _, err := k.g.Undefine(d.Name); err != nil {
				k.log.Warn("definitions", zap.Error(err))
			}
		}
	}
}
