"""What a start of a scientific web service does: import, compute once, serve."""
import http.server
import os

import numpy as np
import pandas as pd
import scipy.fft
import scipy.linalg
import scipy.sparse
import scipy.special

a = np.arange(10000, dtype=float).reshape(100, 100) + np.eye(100)
frame = pd.DataFrame(scipy.sparse.csr_matrix(scipy.linalg.inv(a)).todense()).describe()
text = (str(frame) + str(scipy.special.ndtr(1.0)) + str(scipy.fft.fft(a[0])[:4])).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


server = http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler)
print("ready on", server.server_port, flush=True)
server.serve_forever()
