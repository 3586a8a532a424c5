package main

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	chart "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	chartutil "helm.sh/helm/v4/pkg/chart/v2/util"
	"helm.sh/helm/v4/pkg/engine"
)

// load reads the chart, as one of this release.
func (r *release) load() (*chart.Chart, error) {
	c, err := loader.LoadDir(r.deploy("chart"))
	if err != nil {
		return nil, err
	}
	c.Metadata.Version, c.Metadata.AppVersion = r.version, r.version
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return c, nil
}

// chart packs the chart.
func (r *release) chart() (string, error) {
	c, err := r.load()
	if err != nil {
		return "", err
	}
	c.ModTime, c.SchemaModTime = r.time, r.time
	for _, f := range slices.Concat(c.Raw, c.Templates, c.Files) {
		f.ModTime = r.time
	}
	return chartutil.Save(c, r.out)
}

// render renders the chart with values over its own, as helm does for a release "reprise" in kube-system. What it
// has no text for is left out.
func (r *release) render(values map[string]any) (map[string]string, error) {
	c, err := r.load()
	if err != nil {
		return nil, err
	}
	v, err := util.ToRenderValues(c, values, common.ReleaseOptions{
		Name: "reprise", Namespace: "kube-system", Revision: 1, IsInstall: true,
	}, common.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	texts, err := engine.Engine{Strict: true}.Render(c, v)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for name, text := range texts {
		if strings.TrimSpace(text) != "" {
			out[path.Base(name)] = text
		}
	}
	return out, nil
}

// manifest writes what the chart's own values make, for kubectl apply.
func (r *release) manifest() (string, error) {
	texts, err := r.render(map[string]any{"image": map[string]any{"repository": r.image}})
	if err != nil {
		return "", err
	}
	delete(texts, "NOTES.txt")
	var all []string
	for _, text := range texts {
		all = append(all, strings.TrimSpace(strings.ReplaceAll(text, "app.kubernetes.io/managed-by: Helm", "app.kubernetes.io/managed-by: kubectl"))+"\n")
	}
	slices.Sort(all)
	name := filepath.Join(r.out, "daemonset.yaml")
	text := fmt.Sprintf("# reprise %s: the daemon on every node.\n%s", r.version, strings.Join(all, "---\n"))
	return name, os.WriteFile(name, []byte(text), 0o644)
}
