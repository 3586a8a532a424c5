package compare

import (
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The images are grouped into layers as the official images of their languages
// are: a base system, tools for fetching, tools for version control, compilers
// and headers, the language, and on top of that the packages and the program.

// baseDebs are the packages that Debian calls essential or that its images have.
var baseDebs = []string{
	"base-files", "base-passwd", "bash", "bsdutils", "coreutils", "dash", "debianutils", "diffutils", "dpkg", "findutils",
	"grep", "gzip", "hostname", "init-system-helpers", "libc-bin", "login", "mount", "ncurses-base", "ncurses-bin",
	"perl-base", "sed", "sysvinit-utils", "tar", "util-linux", "apt", "tzdata",
}

// baseRun is what the packages' own scripts do that matters here.
const baseRun = `
cp /usr/share/base-passwd/passwd.master /etc/passwd
cp /usr/share/base-passwd/group.master /etc/group
printf 'passwd: files\ngroup: files\nhosts: files dns\n' > /etc/nsswitch.conf
printf '127.0.0.1 localhost\n::1 localhost\n' > /etc/hosts
: > /etc/resolv.conf
`

var (
	baseLayer  = recipeLayer{debs: baseDebs, run: baseRun}
	fetchLayer = recipeLayer{debs: []string{"ca-certificates", "curl", "gnupg", "netbase", "wget"}}
	scmLayer   = recipeLayer{debs: []string{"git", "mercurial", "openssh-client", "subversion", "procps"}}
)

func env(more ...string) []string {
	return append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "PORT=8080"}, more...)
}

// recipes are the images of the cold starts.
var recipes = []recipe{pythonRecipe, javaRecipe, nodeRecipe}

// pyCompile makes the bytecode that Debian's packages make when they are installed.
const pyCompile = `python3 -m compileall -q /usr/lib/python3* || true`

// pythonRecipe imports NumPy, SciPy and pandas, and serves.
var pythonRecipe = recipe{
	name: "python",
	config: ocispec.ImageConfig{
		Env: env(), WorkingDir: "/srv", Entrypoint: []string{"/usr/bin/python3", "-u", "/srv/app.py"},
	},
	layers: []recipeLayer{
		baseLayer, fetchLayer, scmLayer,
		{debs: []string{
			"build-essential", "gfortran", "cmake", "libssl-dev", "libffi-dev", "libsqlite3-dev", "libxml2-dev", "libxslt1-dev",
			"zlib1g-dev",
		}},
		{debs: []string{"python3", "python3-dev", "python3-venv", "python3-pip"}, run: pyCompile},
		// The links are what update-alternatives makes.
		{debs: []string{"python3-numpy", "python3-scipy"}, run: `
for dir in /usr/lib/*-linux-gnu; do
	[ ! -e $dir/blas/libblas.so.3 ] || ln -s blas/libblas.so.3 $dir/libblas.so.3
	[ ! -e $dir/lapack/liblapack.so.3 ] || ln -s lapack/liblapack.so.3 $dir/liblapack.so.3
done
ldconfig
python3 -c 'import numpy, scipy.linalg'
` + pyCompile},
		{debs: []string{"python3-pandas"}, run: pyCompile},
		{files: map[string]string{"srv/app.py": "app.py"}},
	},
}

// javaRecipe is an HTTP server on OpenJDK 17.
var javaRecipe = recipe{
	name: "java",
	config: ocispec.ImageConfig{
		Env: env("JAVA_HOME=/opt/java"), WorkingDir: "/srv", Entrypoint: []string{"/opt/java/bin/java", "-jar", "/srv/server.jar"},
	},
	layers: []recipeLayer{
		baseLayer, fetchLayer,
		{debs: []string{"locales", "fontconfig", "fonts-dejavu", "libfreetype6", "binutils", "procps"}},
		// The archive of classes is what the package's own script makes.
		{debs: []string{"openjdk-17-jdk-headless"}, run: `
mkdir -p /opt
ln -s /usr/lib/jvm/java-17-openjdk-* /opt/java
/opt/java/bin/java -Xshare:dump >/dev/null
`},
		{files: map[string]string{"srv/Server.java": "Server.java"}},
		{run: `
cd /srv
mkdir /tmp/classes
/opt/java/bin/javac -d /tmp/classes Server.java
/opt/java/bin/jar --create --file server.jar --main-class Server -C /tmp/classes .
rm -r /tmp/classes
`},
	},
}

// nodeModules are installed one a layer.
var nodeModules = []string{
	"express@4.18.2", "lodash@4.17.21", "async@3.2.4", "axios@1.5.0", "uuid@9.0.1", "semver@7.5.4", "yargs@17.7.2",
	"chalk@4.1.2", "bluebird@3.7.2", "moment@2.29.4", "luxon@3.4.3", "underscore@1.13.6", "ramda@0.29.0", "immutable@4.3.4",
	"core-js@3.32.2", "rxjs@7.8.1", "date-fns@2.30.0", "mathjs@11.11.1", "graphql@16.8.1", "validator@13.11.0",
	"joi@17.10.2", "ajv@8.12.0", "handlebars@4.7.8", "koa@2.14.2", "winston@3.10.0", "pg@8.11.3",
	"@babel/core@7.22.20", "@babel/preset-env@7.22.20", "webpack@5.88.2", "eslint@8.50.0", "typescript@5.2.2",
	"sequelize@6.33.0", "mongoose@7.5.3", "aws-sdk@2.1467.0",
}

// nodeRecipe loads some 3,000 modules, and serves.
var nodeRecipe = recipe{
	name: "node",
	config: ocispec.ImageConfig{
		Env: env("NODE_ENV=production"), WorkingDir: "/srv", Entrypoint: []string{"/usr/bin/node", "/srv/app.js"},
	},
	layers: append(append([]recipeLayer{
		baseLayer, fetchLayer, scmLayer,
		{debs: []string{"nodejs"}},
	}, npmLayers(nodeModules)...),
		recipeLayer{files: map[string]string{"srv/app.js": "app.js"}}),
}

func npmLayers(modules []string) (layers []recipeLayer) {
	for _, m := range modules {
		layers = append(layers, recipeLayer{npm: []string{m}})
	}
	return layers
}

// recipeNamed finds a recipe; nil if there is none.
func recipeNamed(name string) *recipe {
	for i, r := range recipes {
		if r.name == name {
			return &recipes[i]
		}
	}
	return nil
}
