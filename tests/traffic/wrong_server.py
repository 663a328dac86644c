"""A server that misbehaves on purpose, so that tests see what the generator makes of it.

Usage: wrong_server.py corrupt|hang-up|silent ADDRESS PORT        (TCP: the last byte is wrong, or no answer at all)
       wrong_server.py swap|twice|other-flow ADDRESS PORT         (UDP: pairs in the wrong order, every echo twice, ...)
"""

import socket
import struct
import sys
import threading

REQUEST = struct.Struct("=IIQQ")
ANSWER = struct.Struct("=IIQ")
DATAGRAM = struct.Struct("=IIQIIQQQII")
ANSWER_MAGIC = 0x50536161
MASK = (1 << 64) - 1


def stream(seed: int, sequence: int, size: int) -> bytes:
    """The bytes that a request asks for; a second implementation of protocol.h's stream_word (splitmix64)."""
    words = bytearray()
    for index in range((size + 7) // 8):
        z = (seed + sequence * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        words += struct.pack("=Q", z ^ z >> 31)
    return bytes(words[:size])


def answer(connection: socket.socket, how: str) -> None:
    """Serve one connection: rightly at first, then wrongly."""
    served = 0
    with connection:
        while len(request := connection.recv(REQUEST.size, socket.MSG_WAITALL)) == REQUEST.size:
            _, size, sequence, seed = REQUEST.unpack(request)
            content = bytearray(stream(seed, sequence, size))
            if served >= 2:
                if how == "hang-up":
                    return
                if how == "silent":
                    continue
                if how == "corrupt":
                    content[-1] ^= 1
            connection.sendall(ANSWER.pack(ANSWER_MAGIC, size, sequence) + content)
            served += 1


def serve_connections(how: str, address: str, port: int) -> None:
    """TCP."""
    with socket.create_server((address, port)) as listener:
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0], how), daemon=True).start()


def serve_datagrams(how: str, address: str, port: int) -> None:
    """UDP."""
    arrivals: dict[tuple[str, int], int] = {}
    held: dict[tuple[str, int], bytes] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, port))
        while True:
            content, peer = server.recvfrom(9000)
            fields = list(DATAGRAM.unpack_from(content))
            arrivals[peer] = arrivals.get(peer, 0) + (fields[1] == 1)
            fields[7] = arrivals[peer]
            if how == "other-flow" and fields[1] == 1:
                fields[3] += 1
            echo = DATAGRAM.pack(*fields) + content[DATAGRAM.size :]
            if how == "swap" and fields[1] == 1:
                if peer not in held:
                    held[peer] = echo
                    continue
                server.sendto(echo, peer)
                echo = held.pop(peer)
            server.sendto(echo, peer)
            if how == "twice" and fields[1] == 1:
                server.sendto(echo, peer)


if __name__ == "__main__":
    serve = serve_connections if sys.argv[1] in ("corrupt", "hang-up", "silent") else serve_datagrams
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
