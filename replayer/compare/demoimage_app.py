"""The demo's workload: an HTTP server that loads a good part of the standard library before it listens.

Usage: app.py [PORT]   (default: $PORT, else 8080; on 127.0.0.1)
Prints one line that starts with "ready" once it accepts connections, and ends at SIGTERM or SIGINT.
"""
import importlib
import io
import os
import pkgutil
import signal
import sys
import time

begin = time.monotonic()

# What a service that talks HTTP, TLS, SQL, XML and e-mail drags in, and what its framework would;
# a module that this Python does not have is left out.
MODULES = """
abc argparse array ast asyncio asyncio.streams asyncio.subprocess asyncio.unix_events base64 bdb bisect bz2
calendar cgi cgitb cmd code codecs codeop collections.abc colorsys compileall concurrent.futures
concurrent.futures.process concurrent.futures.thread configparser contextlib contextvars copy copyreg cProfile
csv ctypes ctypes.util curses dataclasses datetime dbm dbm.dumb decimal difflib dis doctest
email email.charset email.feedparser email.generator email.headerregistry email.mime.application
email.mime.audio email.mime.image email.mime.multipart email.mime.text email.parser email.policy enum
fileinput filecmp fnmatch formatter fractions ftplib functools getopt getpass gettext glob graphlib grp gzip
hashlib heapq hmac html html.entities html.parser http http.client http.cookiejar http.cookies http.server
imaplib imghdr importlib.metadata importlib.resources inspect ipaddress json json.tool keyword lib2to3.pgen2
lib2to3.pygram lib2to3.refactor linecache locale logging logging.config logging.handlers lzma mailbox mailcap
marshal mimetypes mmap modulefinder multiprocessing multiprocessing.managers multiprocessing.pool
multiprocessing.queues multiprocessing.shared_memory multiprocessing.synchronize netrc nntplib numbers
opcode operator optparse pathlib pdb pickle pickletools pipes pkgutil platform plistlib poplib pprint profile
pstats pty py_compile pyclbr pydoc pydoc_data.topics pyexpat queue quopri random re readline reprlib
rlcompleter runpy sched secrets selectors shelve shlex shutil signal site smtpd smtplib sndhdr socket
socketserver sqlite3 sqlite3.dump ssl stat statistics string stringprep struct subprocess sunau symtable
sysconfig syslog tabnanny tarfile telnetlib tempfile termios textwrap this threading timeit token tokenize
tomllib trace traceback tracemalloc tty types typing unicodedata unittest unittest.async_case unittest.mock
urllib.error urllib.parse urllib.request urllib.response urllib.robotparser uu uuid venv warnings wave weakref
webbrowser wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util wsgiref.validate xdrlib
xml.dom.expatbuilder xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree xml.parsers.expat xml.sax
xml.sax.expatreader xml.sax.handler xml.sax.saxutils xmlrpc.client xmlrpc.server zipapp zipfile zipimport
zlib zoneinfo
""".split()

ZONES = "UTC Europe/Berlin Europe/London America/New_York America/Sao_Paulo Asia/Tokyo Asia/Kolkata Africa/Lagos".split()


def load():
    """Imports MODULES and every codec; returns how many modules are loaded then."""
    import encodings

    codecs_ = ["encodings." + m.name for m in pkgutil.iter_modules(encodings.__path__)]
    stdout, sys.stdout = sys.stdout, io.StringIO()  # the module named "this" is chatty
    try:
        for name in MODULES + codecs_:
            try:
                importlib.import_module(name)
            except ImportError:
                pass
    finally:
        sys.stdout = stdout
    return len(sys.modules)


def set_up():
    """Builds what such a service builds before it listens."""
    import sqlite3
    import ssl
    import zoneinfo

    ssl.create_default_context()
    sqlite3.connect(":memory:").execute("create table hits (at real, path text)")
    for zone in ZONES:
        try:
            zoneinfo.ZoneInfo(zone)
        except zoneinfo.ZoneInfoNotFoundError:
            pass


def main():
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda *_: os._exit(0))  # as pid 1 the default would be to ignore it
    port = int(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PORT", "8080"))
    modules = load()
    set_up()

    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from socketserver import TCPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = f"{modules} modules\n".encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        def server_bind(self):  # without HTTPServer's look-up of the host's name
            TCPServer.server_bind(self)
            self.server_name, self.server_port = self.server_address[:2]

    server = Server(("127.0.0.1", port), Handler)
    took = time.monotonic() - begin
    print(f"ready on 127.0.0.1:{server.server_port} after {took:.3f} s with {modules} modules", flush=True)
    server.serve_forever()


main()
