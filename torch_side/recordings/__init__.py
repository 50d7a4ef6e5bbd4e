"""Recordings: files that the items of a stream are written to while training goes on, and that are read at random later.

Modules, from the bytes up: :mod:`.item` (one item), :mod:`.archive` (a file of items), :mod:`.mapped` (a file in memory),
:mod:`.files` (the files of a recording, and who writes them), then :mod:`.recorder`, :mod:`.reader` and :mod:`.verification`.
Recordings of blendtorch are read by :mod:`.old`.
"""
