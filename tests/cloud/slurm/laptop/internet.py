"""internet.py CERTIFICATE KEY: what SkyPilot asks whether there is a network at all, before it calls a node lost: HTTPS at 8.8.8.8."""

import ssl
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer


class Hello(SimpleHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(204)
        self.end_headers()


certificate, key = sys.argv[1:]
server = ThreadingHTTPServer(("8.8.8.8", 443), Hello)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
