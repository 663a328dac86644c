"""Answers on ADDRESS PORT with ADDRESS: to HTTP once, to anything else as often as it is asked."""

import socketserver
import sys


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        me = sys.argv[1].encode()
        while asked := self.request.recv(4096):
            if asked.startswith(b"GET "):
                self.request.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(me), me))
                return
            self.request.sendall(me + b" " + asked)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    address_family = 10 if ":" in sys.argv[1] else 2


Server((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
