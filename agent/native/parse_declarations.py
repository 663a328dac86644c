"""parse_declarations.py CDEF OUTPUT: a Python module with what cffi makes of these declarations, so that nobody waits for it.

It begins with the checksum of the declarations: whoever imports it can see that it is of those that are beside it.
"""

import hashlib
import sys
from pathlib import Path

import cffi

source, output = (Path(word) for word in sys.argv[1:])
declared = source.read_text()
ffi = cffi.FFI()
ffi.cdef(declared)
ffi.set_source(output.stem, None)
ffi.emit_python_code(str(output))
checksum = hashlib.sha256(declared.encode()).hexdigest()
output.write_text(f'PARSED = "{checksum}"\n{output.read_text()}')
