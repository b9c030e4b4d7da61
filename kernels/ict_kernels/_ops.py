"""The namespace that this copy of the package registers its ops in.

One process may hold several copies: the installed one, one in a vendored folder, one of Hugging Face's kernel
hub. Each registers `torch.ops.<its own import path>_<digest of its files>`, so none takes another's ops away.
The digest is for torch's caches of compiled graphs: they know an op by its name, not by what its gradient is,
and would go on with an older version's. (The hub's builder writes a file of this name and with this function
itself, and puts a digest in too.)
"""

import hashlib
import re
from pathlib import Path


def _digest() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:8]


NAMESPACE = re.sub(r"\W", "_", f"{__package__ or 'ict_kernels'}_{_digest()}")


def add_op_namespace_prefix(op_name: str) -> str:
    """`<namespace>::<op_name>`, as torch.library wants it."""
    return f"{NAMESPACE}::{op_name}"
