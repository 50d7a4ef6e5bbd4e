"""The arguments that the launcher gives to each instance's script."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from blendtorch_shm.launch.address import Address, NamedSockets, resolve


class _Sockets(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[str] | None,
        option_string: str | None = None,
    ) -> None:
        sockets: NamedSockets[Address] = NamedSockets()
        for text in [values] if isinstance(values, str) else values or []:
            name, separator, endpoint = text.partition("=")
            if not separator or not name or not endpoint:
                parser.error(f"argument -btsockets: expected NAME=ADDRESS, found {text!r}")
            sockets[name] = resolve(endpoint)
        setattr(namespace, self.dest, sockets)


def parse_blendtorch_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read what the launcher passed to this instance.

    Args:
        argv: defaults to ``sys.argv``; what follows ``--`` counts.

    Returns:
        ``btargs``, with ``btid`` (int or None), ``btseed`` (int or None) and ``btsockets`` (:class:`NamedSockets`:
        name to :class:`~blendtorch_shm.launch.address.Address`, a str); and the remaining arguments, the instance's own.

    Raises:
        SystemExit: an argument is malformed; says which.
    """
    arguments = list(sys.argv if argv is None else argv)
    if "--" in arguments:
        arguments = arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="blendtorch script", allow_abbrev=False, add_help=False)
    parser.add_argument("-btid", type=int, help="number of this instance")
    parser.add_argument("-btseed", type=int, help="seed of this instance")
    parser.add_argument(
        "-btsockets", nargs="+", action=_Sockets, default=NamedSockets(), metavar="NAME=ADDRESS", help="sockets to bind"
    )
    return parser.parse_known_args(arguments)
