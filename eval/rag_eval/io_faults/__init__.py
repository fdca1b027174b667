"""Disk faults and power cuts for tests and benchmarks: every call below a folder is seen, and may fail.

``DiskCalls`` stands between Python and the disk for one folder: it counts the calls that change it,
makes one fail, or records what a crash between any two of them would leave. C libraries that write to
files of their own are not seen; this project's writers use none.
"""

from rag_eval.io_faults.calls import CHANGES, Call, DiskCalls, Fault
from rag_eval.io_faults.crashes import CrashRecorder, Image

__all__ = ["CHANGES", "Call", "CrashRecorder", "DiskCalls", "Fault", "Image"]
