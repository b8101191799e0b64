"""Files, and batches of requests in them: `/v1/files` and `/v1/batches`, as OpenAI has them.

uploads ▶ Files ─ lines ▶ Batches ─ each line a request of the app, behind all live ones ▶ Outputs

Off unless a folder is set (`files_dir`), which one service uses at a time; all of it goes on after a restart.
"""

import prefill_service.api  # noqa: F401  the app takes what lies here into itself, so it goes first
from prefill_service.batches.files import FileLimits, Files
from prefill_service.batches.runner import Batches, BatchLimits

__all__ = ["BatchLimits", "Batches", "FileLimits", "Files"]
