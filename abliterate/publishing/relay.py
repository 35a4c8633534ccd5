"""``--stream``: from Hub to Hub, shard by shard, through a disk that holds about two shards.

The headers of the base come first, by range requests, and with them the few small tensors that a shard needs from other
shards (norm gains, scales).  Then every shard is fetched, edited, proven, sent and deleted.  What is sent is named by
no commit until the end, so an unfinished upload is invisible.  A journal in ``NAME.partial`` keeps what was sent and
proven: the same command continues with the first shard that is not in it.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.arch.edit_plan import EditPlan
from abliterate.checkpoint import upload
from abliterate.checkpoint.header import Shard, TensorInfo, read_header, read_shard
from abliterate.checkpoint.hub import open_remote, plain_errors
from abliterate.checkpoint.output import OutputFolder, check_space, fingerprint
from abliterate.checkpoint.shells import RemoteFiles, write_shell
from abliterate.checkpoint.source import INDEX_NAME, Checkpoint, looks_like_path, open_folder
from abliterate.checkpoint.transfer import one_core
from abliterate.checkpoint.upload_errors import plain_upload_errors, quiet_client
from abliterate.editing.asked import stream_asked
from abliterate.editing.planning import along, plan
from abliterate.editing.shards import Editor
from abliterate.editing.writing import TASK as EDIT
from abliterate.editing.writing import editor_for, edits_of, plain_failures, write_other_files, write_shard
from abliterate.errors import CheckpointError, PlanRefusedError, UsageError, VerificationError
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.method.directions import DirectionSet
from abliterate.publishing import manifest
from abliterate.publishing.journal import Journal
from abliterate.publishing.keeping import keep_origin, require_verified
from abliterate.publishing.push import Published, default_message, interrupted, published, refuse_base, warn_if_gated
from abliterate.recipe import NOT_IN_WORK, Recipe
from abliterate.verification.checkpoint_proof import TASK as VERIFY
from abliterate.verification.checkpoint_proof import ShardCheck, ShardReport, gather
from abliterate.verification.report import VerifyReport

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

FETCH, UPLOAD = "fetch", "upload"
INCOMING = "incoming"


def stream(
    model: str,
    direction: DirectionSet,
    name: str,
    out: Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    branch: str | None = None,
    private: bool = False,
    message: str | None = None,
    on_event: OnEvent = ignore,
) -> Published:
    """Edit the Hub model ``model`` and upload it as ``name``; ``out.partial`` is the work folder, gone at the end.

    ``revision`` is the base's; ``branch`` (None: main) is where the result goes, made if it is not there.

    Raises:
        UsageError: ``model`` is not on the Hub, or no branch can be called so.
        PlanRefusedError: the edit cannot be made, or the disk cannot hold two shards.
        VerificationError: a shard is not what it must be; nothing of it is to be seen on the Hub.
        HubError: the Hub refused or cannot be reached.
        InterruptedRunError: stopped; the same command continues.
    """
    if looks_like_path(model) or Path(model).is_dir():
        raise UsageError(f"{model}: lies on this disk", "edit it there, verify it, and push the result")
    refuse_base(model, name, branch)
    work = out.with_name(out.name + ".partial")
    try:
        with quiet_client(on_event):
            with plain_upload_errors(name):
                target = upload.look(name, branch=branch, private=private)
            relay = _prepare(model, direction, target, work, recipe, revision=revision, on_event=on_event)
            return relay.run(message)
    except KeyboardInterrupt:
        raise interrupted(name) from None


def _prepare(
    model: str,
    direction: DirectionSet,
    target: upload.Target,
    work: Path,
    recipe: Recipe,
    *,
    revision: str | None,
    on_event: OnEvent,
) -> "Relay":
    with plain_errors(model):
        remote = open_remote(model, revision=revision)
        files = RemoteFiles.of(model, remote.revision)
    plan(remote, **recipe.plan_options)  # refuses here, before anything is made
    largest = max(files.files[shard.name].size_bytes for shard in remote.shards)
    small = sum(files.files[other].size_bytes for other in remote.other_files)
    check_space(work, 2 * largest + 2 * small)
    journal = Journal.open(work, fingerprint_of(remote, recipe, direction, target))
    base = lay_out(remote, files, work / "base")
    made = plan(base, **recipe.plan_options)
    if not journal.filled:
        with plain_errors(model):
            files.fill(needed_elsewhere(made), base.folder)
        journal.filled = True
        journal.write()
    made = along(made, stream_asked(recipe.edit, direction, made.model_map.n_layers))  # no rows to read yet
    if made.stream is not None and made.stream.lacks_lengths:
        raise PlanRefusedError(
            f"{model}: rows keep their lengths only where all weights are at hand, and here they pass shard by shard",
            "run or edit without --stream, and push the result",
        )
    if constants := [one.name for one in made.writers if made.edits[one.tensor.name].constant is not None]:
        raise PlanRefusedError(
            f"{model}: '{constants[0]}' would gain a constant, which is held against its rows, and here shards pass "
            "singly",
            "run or edit without --stream, and push the result",
        )
    with plain_upload_errors(target.name):
        target = upload.create(target)
    return Relay(
        plan=made, directions=direction, target=target, files=files, work=work, recipe=recipe, journal=journal,
        on_event=on_event,
    )  # fmt: skip


def fingerprint_of(remote: Checkpoint, recipe: Recipe, direction: DirectionSet, target: upload.Target) -> str:
    """What makes two streams the same."""
    document = {
        "stream": [remote.name, remote.revision, target.name, target.branch],
        "recipe": recipe.flat(without=NOT_IN_WORK),
        "direction": direction.sha256,
    }
    return fingerprint(document)


def lay_out(remote: Checkpoint, files: RemoteFiles, folder: Path) -> Checkpoint:
    """The base in ``folder``: shells of its shards, and its other files whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob("*.tmp"):
        unfinished.unlink()
    others = [*remote.other_files, *([INDEX_NAME] if remote.index is not None else [])]
    with plain_errors(remote.name):
        for shard in remote.shards:
            if shell_of(folder / shard.name).exists() and (folder / shard.name).exists():
                (folder / shard.name).replace(folder.with_name(INCOMING) / shard.name)  # fetched already
            set_aside(folder / shard.name)
            if not (folder / shard.name).exists():
                files.make_shell(shard.name, folder / shard.name)
        for name in others:
            files.download(name, folder)
    return open_folder(folder, name=remote.name, revision=remote.revision)


def shell_of(path: Path) -> Path:
    """Where the shell of a shard lies while the whole shard is here."""
    return path.with_name(path.name + ".shell")


def set_aside(path: Path) -> None:
    """Let go of a whole shard: its shell takes its place again."""
    if shell_of(path).exists():
        shell_of(path).replace(path)


def hollow(path: Path) -> None:
    """Leave of a shard its header and its size."""
    shard = read_shard(path.parent, path.name)
    write_shell(path, read_header(path, shard), shard.size_bytes)


def needed_elsewhere(made: EditPlan) -> list[TensorInfo]:
    """Small tensors that must be here before, or while, another shard is edited: norm gains, and scales."""
    found = {norm.name: norm for writer in made.writers for norm in writer.norms}
    for writer in made.writers:
        if writer.packed is not None and writer.packed.scales.shard != writer.tensor.shard:
            found[writer.packed.scales.name] = writer.packed.scales
    return list(found.values())


@dataclass(kw_only=True)
class Relay:
    """The way of one checkpoint through the work folder: ``base`` (shells), ``incoming``, ``edited``."""

    plan: EditPlan
    directions: DirectionSet
    target: upload.Target
    files: RemoteFiles
    work: Path
    recipe: Recipe
    journal: Journal
    on_event: OnEvent

    @cached_property
    def output(self) -> OutputFolder:
        """What will be on the Hub; shells stand for shards that are there already."""
        folder = OutputFolder(final=self.work, path=self.work / "edited", fingerprint="")
        folder.path.mkdir(exist_ok=True)
        for path in folder.path.iterdir():  # what an earlier run left
            if self.journal.is_large(path.name):
                hollow(path)
            elif path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self.journal.shards:
                path.unlink()
        return folder

    def run(self, message: str | None) -> Published:
        """All shards, everything else, one commit; then the work folder goes."""
        shards = self.plan.checkpoint.shards
        for task, total in (
            (FETCH, self.plan.checkpoint.size_bytes),
            (EDIT, self.plan.output_bytes),
            (VERIFY, self.plan.checkpoint.size_bytes),
            (UPLOAD, self.plan.output_bytes),
        ):
            self.on_event(Started(task=task, total=total, unit="bytes"))
        edit_of = edits_of(self.plan, self.recipe.edit.rounding)
        editor = editor_for(self.plan, edit_of, memory_bytes=self.recipe.edit_memory_bytes, on_event=self.on_event)
        with plain_failures(self.output, self.plan.checkpoint), one_core(needed=not self.plan.packed):
            for shard in shards:
                if shard.name in self.journal.shards:
                    self._advance(shard.size_bytes, FETCH, EDIT, VERIFY, UPLOAD)
                else:
                    self._pass_on(shard, editor)
            document = self._finish()
        operations = list(self._operations())
        with plain_upload_errors(self.target.name):
            commit = upload.commit(self.target, operations, message or default_message(document))
        for task in (FETCH, EDIT, VERIFY, UPLOAD):
            self.on_event(Finished(task=task))
        size = sum(operation.upload_info.size for operation in operations)
        shutil.rmtree(self.work)
        self.journal.unlock()
        return published(self.target, commit, files=len(operations), size_bytes=size)

    def _pass_on(self, shard: Shard, editor: Editor) -> None:
        """One shard: fetch, edit, prove, send, delete."""
        whole, edited = self.plan.checkpoint.folder / shard.name, self.output.path / shard.name
        self._bring(shard, whole)
        write_shard(editor, self.plan, shard, edited)
        report = self._prove(shard, edited)
        set_aside(whole)
        with plain_upload_errors(self.target.name):
            [operation] = upload.send(self.target, [(shard.name, edited, report.sha256)])
        large, size = upload.is_large(operation), edited.stat().st_size
        self.journal.add(report, upload.Sent(path=shard.name, size_bytes=size, sha256=report.sha256), large=large)
        if large:
            hollow(edited)
        self._advance(size, UPLOAD)

    def _bring(self, shard: Shard, whole: Path) -> None:
        incoming = self.work / INCOMING
        with plain_errors(self.plan.checkpoint.name):
            path = self.files.download(shard.name, incoming)
        if read_shard(incoming, shard.name) != shard:
            path.unlink()
            raise CheckpointError(
                f"{shard.name}: what arrived is not what its header said", "run the same command again"
            )
        whole.replace(shell_of(whole))
        path.replace(whole)
        self._advance(shard.size_bytes, FETCH)

    def _prove(self, shard: Shard, edited: Path) -> ShardReport:
        result = Checkpoint(
            name=self.target.name,
            root=self.output.path,
            revision=None,
            config=self.plan.checkpoint.config,
            shards=(read_shard(self.output.path, shard.name),),
            index=None,
            other_files=(),
            left_out=(),
        )
        check = ShardCheck.of(self.plan, result, shard, self.recipe.edit_memory_bytes)
        check.run(lambda amount: self._advance(amount, VERIFY))
        report, expected = check.report(), self.files.files[shard.name].sha256
        if expected is not None and report.source_sha256 != expected:
            set_aside(self.plan.checkpoint.folder / shard.name)  # fetch it again
            raise CheckpointError(
                f"{shard.name}: what arrived is not what the Hub holds (its SHA-256 differs)",
                "run the same command again",
            )
        if report.failures:
            raise VerificationError(
                f"verification failed: {report.failures[0]}",
                f"nothing of it is to be seen at {self.target.name}; look at {edited}, and delete {self.work}",
            )
        return report

    def _finish(self) -> dict[str, Any]:
        """Everything but the shards; the whole is proven from the journal's proofs and the files here."""
        write_other_files(self.plan, self.output)
        keep_origin(self.plan, self.directions, self.recipe, self.output)
        result = open_folder(self.output.path, name=self.target.name)
        reports = [self.journal.report(shard.name) for shard in self.plan.checkpoint.shards]
        verification = VerifyReport(bytes=gather(self.plan, result, reports), behaviour=None)
        require_verified(verification, self.output)
        document = manifest.build(self.plan, self.directions, self.recipe, verification=verification)
        manifest.finish(self.output, self.plan, document)
        warn_if_gated(self.output.path, self.on_event)
        return document

    def _operations(self) -> "Iterator[CommitOperationAdd]":
        here = []
        for name in manifest.files_of(self.output.path):
            if self.journal.is_large(name):
                yield self.journal.sent(name).operation()
            else:
                here.append((name, self.output.path / name, None))
        with plain_upload_errors(self.target.name):
            yield from upload.send(self.target, here)

    def _advance(self, amount: int, *tasks: str) -> None:
        for task in tasks:
            self.on_event(Advanced(task=task, amount=amount))
