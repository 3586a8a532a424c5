package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/replayer/compare"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

// rmFlags say which traces are removed.
type rmFlags struct {
	node             nodeFlags
	workload, digest string
	all              bool
}

func newTraceRm() *cobra.Command {
	f := &rmFlags{}
	cmd := &cobra.Command{
		Use:   "rm REF --workload NAME | --digest DIGEST | --all",
		Short: "Remove traces beside an image",
		Long: `Remove traces beside an image. A registry that does not allow deletes keeps their
bytes; they are taken off the list then, and no node finds them any more.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			return withTraces(cmd, &f.node, a[0], func(s *artifact.Store, m registry.Manifest) error {
				return f.run(cmd, a[0], s, m)
			})
		},
	}
	f.node.addRegistry(cmd)
	f.node.addPlatform(cmd)
	cmd.Flags().StringVar(&f.workload, "workload", "", "the trace of this workload")
	cmd.Flags().StringVar(&f.digest, "digest", "", "the trace of that digest, as trace ls lists it")
	cmd.Flags().BoolVar(&f.all, "all", false, "all traces of the image")
	return cmd
}

// check finds what is wrong with the flags themselves.
func (f *rmFlags) check(cmd *cobra.Command) error {
	n := 0
	for _, set := range []bool{f.workload != "", f.digest != "", f.all} {
		if set {
			n++
		}
	}
	if n != 1 {
		return usagef(cmd, "give one of --workload, --digest and --all")
	}
	if f.digest != "" {
		if _, err := digest.Parse(f.digest); err != nil {
			return usagef(cmd, "--digest %s: %v", f.digest, err)
		}
	}
	return nil
}

func (f *rmFlags) run(cmd *cobra.Command, ref string, s *artifact.Store, m registry.Manifest) error {
	if f.digest != "" {
		del, err := s.DeleteDigest(cmd.Context(), m.Descriptor, digest.Digest(f.digest))
		if err != nil {
			return err
		}
		sayRemoved(cmd, del.Workload, del.Kept)
		return nil
	}
	workloads := []string{f.workload}
	if f.all {
		entries, err := s.List(cmd.Context(), m.Descriptor.Digest)
		if err != nil {
			return err
		}
		workloads = nil
		for _, e := range entries {
			workloads = append(workloads, e.Workload)
		}
	}
	for _, w := range workloads {
		kept, err := s.Delete(cmd.Context(), m.Descriptor, w)
		if errors.Is(err, os.ErrNotExist) && !f.all {
			return fmt.Errorf("%s: no trace of workload %q: see 'reprise trace ls'", ref, w)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		sayRemoved(cmd, w, kept)
	}
	return nil
}

func sayRemoved(cmd *cobra.Command, workload string, kept bool) {
	how := ""
	if kept {
		how = "; the registry does not allow deletes, so it keeps the bytes, but nobody finds them by name any more"
	}
	fmt.Fprintf(cmd.OutOrStdout(), "removed the trace of workload %s%s\n", compare.Printable(workload), how)
}
