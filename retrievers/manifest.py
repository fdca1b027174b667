"""The one file that says what an index is: read first, replaced last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from retrievers.durable import replace_file, storage_faults, sync_folder, sync_tree
from retrievers.errors import CorruptIndexError, RetrievalError
from retrievers.index_settings import IndexSettings

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
NEW_MANIFEST_NAME = "manifest.json.new"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size and checksum of one file of a generation."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Identity, settings and files of the current generation of an index.

    Parameters
    ----------
    generation : str
        Folder, beside the manifest, with the files.
    embedder_name, embedder_fingerprint, dim : str, str, int
        The model whose vectors the index holds.
    metric : str
        ``"inner_product"``; all vectors have unit length.
    factory_requested, factory : str
        What the user asked for (maybe ``"auto"``) and the FAISS string it became.
    search_options : str
        FAISS parameter string applied on opening, such as ``"nprobe=32"``.
    splitter : mapping
        Settings of the splitter, compared on the next ingest.
    tokenizer_fingerprint : str
        Tokenizer that measured the chunks.
    include_title : bool
        Whether titles are part of what is embedded and matched.
    num_documents, num_chunks : int
        Counts.
    num_trained : int
        Vectors the FAISS index was trained on; 0 where it needs no training.
    next_label : int
        First FAISS id never used, so ids are not given twice.
    files : mapping of str to FileRecord
        Relative path to size and checksum.
    """

    generation: str
    embedder_name: str
    embedder_fingerprint: str
    dim: int
    factory_requested: str
    factory: str
    search_options: str
    splitter: Mapping[str, Any]
    tokenizer_fingerprint: str
    include_title: bool
    num_documents: int
    num_chunks: int
    num_trained: int
    next_label: int
    metric: str = "inner_product"
    format_version: int = FORMAT_VERSION
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    @property
    def settings(self) -> IndexSettings:
        """Settings that change nothing but the documents."""
        return IndexSettings(
            embedder_name=self.embedder_name,
            embedder_fingerprint=self.embedder_fingerprint,
            dim=self.dim,
            splitter=self.splitter,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            include_title=self.include_title,
        )

    def write(self, folder: Path) -> None:
        """Replace the manifest of `folder` in one step; the commit point of every change."""
        body = asdict(self)
        body["checksum"] = _checksum(body)
        # Every name that the manifest gives must be on the disk before the manifest is.
        sync_folder(folder)
        content = json.dumps(body, indent=1, sort_keys=True).encode("utf-8")
        replace_file(folder / MANIFEST_NAME, folder / NEW_MANIFEST_NAME, content)
        with storage_faults(
            f"the new state of {folder} is not safe from a power cut yet", state="it is in use"
        ):
            sync_folder(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of `folder`.

        Raises
        ------
        RetrievalError
            Where `folder` holds no index, or one of another format version.
        CorruptIndexError
            Where the manifest was cut off or altered.
        """
        path = folder / MANIFEST_NAME
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RetrievalError(
                f"{folder} holds no index ({MANIFEST_NAME} is missing); "
                "build one with `rag-pipeline ingest`"
            ) from None
        except NotADirectoryError:
            raise RetrievalError(f"{folder} is a file, not an index folder") from None
        except (OSError, ValueError) as exc:
            raise CorruptIndexError(f"{path} cannot be read ({exc}); ingest again") from exc
        if not isinstance(body, dict) or body.pop("checksum", None) != _checksum(body):
            raise CorruptIndexError(f"{path} fails its checksum; ingest into a new folder")
        version = body.get("format_version")
        if version != FORMAT_VERSION:
            raise RetrievalError(
                f"{folder} has index format {version}, this version reads {FORMAT_VERSION}; "
                "ingest again into a new folder"
            )
        if set(body) != {item.name for item in fields(cls)}:
            raise CorruptIndexError(f"{path} has other fields than format {version}; ingest again")
        body["files"] = {name: FileRecord(**record) for name, record in body["files"].items()}
        return cls(**body)

    def check_files(self, folder: Path, *, contents: bool, skip: frozenset[str]) -> None:
        """Compare the files of the generation with what was recorded.

        Parameters
        ----------
        folder : Path
            The index folder.
        contents : bool
            Also compute every checksum; else sizes only.
        skip : frozenset of str
            Names whose contents are not read.

        Raises
        ------
        CorruptIndexError
            For a missing, cut off or altered file.
        """
        root = folder / self.generation
        for name, record in self.files.items():
            path = root / name
            try:
                size = path.stat().st_size
            except OSError:
                raise CorruptIndexError(f"{path} is missing; ingest again") from None
            if size != record.size:
                raise CorruptIndexError(
                    f"{path} has {size} bytes, {record.size} expected; ingest again"
                )
            if contents and name not in skip and file_digest(path) != record.sha256:
                raise CorruptIndexError(f"{path} fails its checksum; ingest again")


def record_files(root: Path) -> dict[str, FileRecord]:
    """Size and checksum of every file under `root`; all of it survives a power cut afterwards."""
    sync_tree(root)
    return {
        path.relative_to(root).as_posix(): FileRecord(
            size=path.stat().st_size, sha256=file_digest(path)
        )
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
