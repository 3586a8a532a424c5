'use strict'
// What a start of a large service does: load thousands of modules, serve.
const fs = require('fs')
const http = require('http')
const path = require('path')

for (const name of [
  'express', 'async', 'axios', 'uuid', 'semver', 'yargs', 'chalk', 'bluebird', 'moment', 'luxon', 'underscore', 'ramda',
  'immutable', 'core-js', 'rxjs', 'rxjs/operators', 'date-fns', 'graphql', 'validator', 'joi', 'ajv', 'handlebars', 'koa',
  'winston', 'pg'
]) require(name)

// Each function of lodash in a module of its own, as bundles that pick functions load it.
const lodash = path.dirname(require.resolve('lodash'))
for (const file of fs.readdirSync(lodash).sort()) {
  if (/^[a-z]\w*\.js$/.test(file) && !/^(lodash|core)\b/.test(file)) require(path.join(lodash, file))
}

const server = http.createServer((_, response) => response.end('hello\n'))
server.listen(Number(process.env.PORT), '127.0.0.1', () => {
  console.log(`ready on ${server.address().port}, ${Object.keys(require.cache).length} modules loaded`)
})
