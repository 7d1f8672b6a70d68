"""A connected socket that never blocks: gather-write and read, plain or TLS, with one way to say "gone"."""

from __future__ import annotations

import array
import errno
import os
import select
import selectors
import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress

from deepseek_ray.errors import LinkClosedError, LinkError, LinkLostError

Buffer = bytes | bytearray | memoryview
_UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)
MAX_PARTS = 512  # below IOV_MAX (1024) everywhere
# plain integers: arithmetic on the enum members costs a microsecond each time
_TRUNCATED, _CLOSE_ON_EXEC = int(socket.MSG_CTRUNC), int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_ANCILLARY_BYTES = socket.CMSG_SPACE(array.array("i", [0]).itemsize * 4)


EVENT_READ, EVENT_WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Channel:
    """A plain stream socket. One thread reads and one writes at a time; the two need not be the same."""

    pending = False
    """Whether bytes wait in this process that no selector sees (TLS)."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def write(self, parts: Sequence[Buffer], descriptors: Sequence[int] = ()) -> int:
        """Write what fits now; the number of bytes taken, 0 when there is no room. Raises LinkClosedError."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else ()
        try:
            return self._sock.sendmsg(parts[:MAX_PARTS], rights)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _end_of_link(error) from None

    def read_into(self, view: memoryview) -> int:
        """Read what is there; the number of bytes, 0 when there is nothing yet. Raises LinkClosedError at the end."""
        try:
            count = self._sock.recv_into(view)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _end_of_link(error) from None
        if not count:
            raise end_of_file()
        return count

    def read_with_descriptors(self, view: memoryview) -> tuple[int, list[int]]:
        """`read_into` on a UNIX socket, with the descriptors that came along; the caller closes them."""
        try:
            count, rights, flags, _ = self._sock.recvmsg_into([view], _ANCILLARY_BYTES, _CLOSE_ON_EXEC)
        except BlockingIOError:
            return 0, []
        except OSError as error:
            raise _end_of_link(error) from None
        descriptors = _descriptors(rights) if rights else []
        if flags & _TRUNCATED:
            for descriptor in descriptors:
                os.close(descriptor)
            raise LinkError("the peer sent more descriptors than a link ever carries; the link is out of step")
        if not count:
            raise end_of_file()
        return count, descriptors

    def shut_down(self) -> None:
        """End both directions without giving the descriptor back: whoever waits on it wakes up."""
        cut_off(self._sock)

    def close(self) -> None:
        self._sock.close()


class TlsChannel(Channel):
    """The same over TLS. OpenSSL allows one call at a time on a connection, hence the lock; no call blocks."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        self._tls = sock
        self._lock = threading.Lock()

    def write(self, parts: Sequence[Buffer], descriptors: Sequence[int] = ()) -> int:
        total = 0
        for part in parts:
            count = self._write_one(part)
            total += count
            if count < len(part):
                break
        return total

    def _write_one(self, part: Buffer) -> int:
        view, done = memoryview(part), 0
        while done < len(view):
            try:
                with self._lock:
                    done += self._tls.send(view[done:])
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                break
            except OSError as error:
                raise _end_of_link(error) from None
        return done

    def read_into(self, view: memoryview) -> int:
        done = 0
        while done < len(view):
            try:
                with self._lock:
                    count = self._tls.recv_into(view[done:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            except OSError as error:
                raise _end_of_link(error) from None
            if not count:
                if done:
                    break
                raise end_of_file()
            done += count
        return done

    @property
    def pending(self) -> bool:  # type: ignore[override]
        with self._lock:
            return self._tls.pending() > 0


class SocketWait:
    """Waiting for a channel. Whether room to write counts may be changed while another thread waits."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, EVENT_READ)

    def wait(self, seconds: float | None) -> int:
        """The events that hold, EVENT_READ (also at the end) and EVENT_WRITE; 0 when time is up."""
        found = self._selector.select(seconds)
        return found[0][1] if found else 0

    def watch_output(self, on: bool) -> None:
        self._selector.modify(self._channel, EVENT_READ | (EVENT_WRITE if on else 0))

    def fileno(self) -> int:
        """A descriptor that is readable when `wait` has something to report."""
        return self._selector.fileno()

    def close(self) -> None:
        self._selector.close()


class EpollWait:
    """`SocketWait` on Linux, without the 2 microseconds that the selectors module adds to every wait."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._epoll = select.epoll()
        self._epoll.register(channel, select.EPOLLIN)

    def wait(self, seconds: float | None) -> int:
        found = self._epoll.poll(seconds)
        if not found:
            return 0
        flags = found[0][1]  # EPOLLHUP and EPOLLERR count as both, as in selectors
        return (EVENT_READ if flags & ~select.EPOLLOUT else 0) | (EVENT_WRITE if flags & ~select.EPOLLIN else 0)

    def watch_output(self, on: bool) -> None:
        self._epoll.modify(self._channel, select.EPOLLIN | (select.EPOLLOUT if on else 0))

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        self._epoll.close()


def socket_wait(channel: Channel) -> SocketWait | EpollWait:
    """The fastest way to wait that this system has."""
    return EpollWait(channel) if hasattr(select, "epoll") else SocketWait(channel)


class Readiness:
    """One descriptor that is readable when the socket is, or when a flag is set: for frames that were already read."""

    def __init__(self, socket_wait: SocketWait | EpollWait) -> None:
        self._read_end, self._write_end = os.pipe()
        self._raised = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(socket_wait, EVENT_READ)
        self._selector.register(self._read_end, EVENT_READ)

    def fileno(self) -> int:
        return self._selector.fileno()

    def set(self, raised: bool) -> None:
        """Raise or lower the flag; the caller holds the link's lock."""
        if raised and not self._raised:
            os.write(self._write_end, b"\0")
        elif self._raised and not raised:
            os.read(self._read_end, 1)
        self._raised = raised

    def close(self) -> None:
        self._selector.close()
        os.close(self._read_end)
        os.close(self._write_end)


class ReadBuffer:
    """Bytes read and not yet understood, always from the start of `view`."""

    def __init__(self, num_bytes: int) -> None:
        self.view = memoryview(bytearray(num_bytes))
        self.filled = 0

    @property
    def room(self) -> memoryview:
        return self.view[self.filled :]

    def drop(self, count: int) -> None:
        """Forget the first `count` bytes."""
        left = self.filled - count
        if count and left:
            self.view[:left] = self.view[count : self.filled]
        self.filled = left


def cut_off(sock: socket.socket) -> None:
    """End both directions of a socket that another thread uses; that thread sees the end and closes it."""
    with suppress(OSError):  # the peer was faster
        # not SSLSocket.shutdown: that drops the TLS layer first, and a concurrent reader would see cipher text
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _end_of_link(error: OSError) -> LinkClosedError:
    if error.errno in _UNREACHABLE:
        return LinkLostError(f"the peer cannot be reached any more ({error})")
    return LinkClosedError(f"the peer closed the link or died ({error})")


def end_of_file() -> LinkClosedError:
    return LinkClosedError("the peer closed the link or died (end of file)")


def _descriptors(rights: Sequence[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()
