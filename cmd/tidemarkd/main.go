package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/tidemark-cdp/tidemark/cmd/internal/build"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// A second signal ends the process at once, as a crash would.
	context.AfterFunc(ctx, stop)
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "tidemarkd: %v\n", err)
		os.Exit(1)
	}
}

type flags struct {
	config, stateDir, api string
	nbd, disks, guests    []string
	logFormat, logLevel   string
}

func command() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "tidemarkd --disk GROUP/DISK=BACKING …",
		Short: "Serve virtual machine disks over NBD and journal every write",
		Example: `  tidemarkd --disk web01/vda=/images/vda.raw
  tidemarkd --config /etc/tidemark/tidemark.yaml`,
		Args:          cobra.NoArgs,
		Version:       build.Version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			read := func() (config.Config, error) { return f.load(cmd.Flags().Changed("config")) }
			c, err := read()
			if err != nil {
				return err
			}
			hup := make(chan os.Signal, 1)
			signal.Notify(hup, syscall.SIGHUP)
			defer signal.Stop(hup)
			log, err := newLogger(c.Log)
			if err != nil {
				return err
			}
			defer func() { _ = log.Sync() }() // stderr may not be a file that can be synced
			return run(cmd.Context(), read, hup, log)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.config, "config", config.DefaultFile, "configuration file; the default one may be missing")
	fl.StringVar(&f.stateDir, "state-dir", "", "directory of the journal (default "+config.DefaultStateDir+")")
	fl.StringVar(&f.api, "api", "", "control socket, unix:PATH (default "+config.DefaultAPI+")")
	fl.StringArrayVar(&f.nbd, "nbd", nil, "where to serve NBD, unix:PATH or tcp:HOST:PORT; repeatable (default "+config.DefaultNBD+")")
	fl.StringArrayVar(&f.disks, "disk", nil, "disk to protect, GROUP/DISK=BACKING; repeatable")
	fl.StringArrayVar(&f.guests, "guest", nil, "guest whose file systems can be frozen, GROUP=agent:PATH or GROUP=libvirt:DOMAIN; repeatable")
	fl.StringVar(&f.logFormat, "log-format", "", "json or console (default json)")
	fl.StringVar(&f.logLevel, "log-level", "", "debug, info, warn or error (default info)")
	return cmd
}

// load reads the file and lets flags override it.
func (f *flags) load(named bool) (config.Config, error) {
	c, err := config.Load(f.config)
	if errors.Is(err, fs.ErrNotExist) && !named {
		c, err = config.Config{}, nil
	}
	if err != nil {
		return c, err
	}
	for dst, v := range map[*string]string{&c.StateDir: f.stateDir, &c.API: f.api, &c.Log.Format: f.logFormat, &c.Log.Level: f.logLevel} {
		if v != "" {
			*dst = v
		}
	}
	if len(f.nbd) > 0 {
		c.NBD = f.nbd
	}
	for _, d := range f.disks {
		if err := c.AddDisk(d); err != nil {
			return c, err
		}
	}
	for _, g := range f.guests {
		if err := c.AddGuest(g); err != nil {
			return c, err
		}
	}
	if err := c.AddPromoted(); err != nil {
		return c, err
	}
	c.Default()
	return c, c.Validate()
}

func newLogger(l config.Log) (*zap.Logger, error) {
	zc := zap.NewProductionConfig()
	zc.Sampling = nil
	zc.DisableStacktrace = true
	zc.EncoderConfig.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	if l.Format == "console" {
		zc.Encoding = "console"
		zc.EncoderConfig.EncodeLevel = zapcore.CapitalLevelEncoder
	}
	level, err := zap.ParseAtomicLevel(l.Level)
	if err != nil {
		return nil, err
	}
	zc.Level = level
	return zc.Build()
}
