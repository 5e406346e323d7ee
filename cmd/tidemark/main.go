package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
)

// Exit codes, as documented in docs/cli.md.
const (
	exitError       = 1
	exitUsage       = 2
	exitUnreachable = 3
	exitNotFound    = 4
	exitLabelInUse  = 5
	exitDamage      = 6
	exitNotAtRest   = 7
	exitFrozen      = 8
	exitInUse       = 9
	exitLate        = 10
)

var (
	errUsage  = errors.New("usage")
	errDamage = errors.New("damage was found")
	errLate   = errors.New("a replica has not got it, or not in time")
)

func main() {
	// Whatever ends the program, what it has mounted and started is undone first. A pipe that nobody reads is an error of the write.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer stop()
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	// A second signal ends it at once.
	context.AfterFunc(ctx, stop)
	if err := root().ExecuteContext(ctx); err != nil {
		if !errors.Is(err, syscall.EPIPE) {
			fmt.Fprintf(os.Stderr, "tidemark: %s\n", plain(err.Error()))
		}
		os.Exit(exitCode(err))
	}
}

// plain is a text, which may have a guest's words in it, as a terminal may have it.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

func exitCode(err error) int {
	var e *api.Error
	switch {
	case errors.Is(err, errUsage):
		return exitUsage
	case errors.Is(err, errDamage):
		return exitDamage
	case errors.Is(err, errLate):
		return exitLate
	case errors.Is(err, api.ErrUnreachable):
		return exitUnreachable
	case errors.As(err, &e):
		switch e.Code {
		case api.CodeNotFound, api.CodeNoPoint:
			return exitNotFound
		case api.CodeLabelInUse:
			return exitLabelInUse
		case api.CodeBadRequest:
			return exitUsage
		case api.CodeNotAtRest:
			return exitNotAtRest
		case api.CodeFrozen:
			return exitFrozen
		case api.CodePinned, api.CodeInUse:
			return exitInUse
		}
	}
	var p *problems
	if errors.As(err, &p) {
		return exitFrozen
	}
	return exitError
}

// problems are what the operator must see to though the call was done.
type problems struct{ all []string }

func (p *problems) Error() string { return strings.Join(p.all, "; ") }

// app is what the verbs share.
type app struct {
	api  string
	json bool
}

func root() *cobra.Command {
	a := &app{}
	def := os.Getenv("TIDEMARK_API")
	if def == "" {
		def = config.DefaultAPI
	}
	cmd := &cobra.Command{
		Use:           "tidemark",
		Short:         "Look at, mark and restore the disks that tidemarkd protects",
		Args:          args(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	cmd.PersistentFlags().StringVar(&a.api, "api", def, "the daemon's control socket, unix:PATH; also TIDEMARK_API")
	cmd.PersistentFlags().BoolVar(&a.json, "json", false, "print JSON")
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	cmd.AddCommand(a.status(), a.mark(), a.thaw(), a.points(), a.retain(), a.pin(), a.unpin(), a.hold(), a.describe(), a.delete(), a.definition(), a.reload(), a.restore(), a.rollback(), a.replica(), a.failover(), a.failback(), a.testFailover(), a.export(), a.unexport(), a.promote(), a.attach(), a.detach(), a.ls(), a.cp(), a.diff(), a.versions(), a.mount(), a.showVolumes(), a.keepMoment(), a.verify(), a.dump(), a.version())
	return cmd
}

func usage(err error) error { return fmt.Errorf("%w (%w; see --help)", err, errUsage) }

// args makes a check of positional arguments a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, a []string) error {
		if err := check(cmd, a); err != nil {
			return usage(err)
		}
		return nil
	}
}

func (a *app) client() (*api.Client, error) {
	network, addr, err := config.ParseListen(a.api)
	if err != nil || network != "unix" {
		return nil, usage(fmt.Errorf("--api %q: expected unix:PATH", a.api))
	}
	return api.NewClient(addr), nil
}

// ask makes a command that asks the daemon one thing, and prints the answer: with --json as it is, else as text.
func ask[T any](a *app, call func(ctx context.Context, c *api.Client, args []string) (T, error), text func(*cobra.Command, T) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := a.client()
		if err != nil {
			return err
		}
		got, err := call(cmd.Context(), c, args)
		if err != nil {
			return err
		}
		if a.json {
			return printJSON(cmd, got)
		}
		return text(cmd, got)
	}
}

// say prints a line of a command's output.
func say(cmd *cobra.Command, format string, args ...any) error {
	_, err := fmt.Fprintf(cmd.OutOrStdout(), format+"\n", args...)
	return err
}

// printJSON writes one value to the command's output.
func printJSON(cmd *cobra.Command, v any) error {
	enc := json.NewEncoder(cmd.OutOrStdout())
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// completeGroups completes a group's name from what the daemon has.
func (a *app) completeGroups(cmd *cobra.Command, done []string, _ string) ([]string, cobra.ShellCompDirective) {
	c, err := a.client()
	if err != nil || len(done) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	s, err := c.Status(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, g := range s.Groups {
		names = append(names, g.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
