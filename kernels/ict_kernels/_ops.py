"""The namespace that this copy of the package registers its ops in.

One process may hold several copies: the installed one, one in a vendored folder, one of Hugging Face's kernel
hub. Each registers `torch.ops.<its own import path>`, so none takes another's ops away; the installed one's
are `torch.ops.ict_kernels`. (The hub's builder writes a file of this name and with this function itself.)
"""

import re

_NAMESPACE = re.sub(r"\W", "_", __package__ or "ict_kernels")


def add_op_namespace_prefix(op_name: str) -> str:
    """`<namespace>::<op_name>`, as torch.library wants it."""
    return f"{_NAMESPACE}::{op_name}"
