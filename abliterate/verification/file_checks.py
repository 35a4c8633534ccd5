"""What verification compares besides the tensors of a shard: the added head, and every other file."""

from pathlib import Path

from abliterate.arch.edit_plan import EditPlan, untied_config
from abliterate.checkpoint.hashes import same_bytes, sha256_file
from abliterate.checkpoint.output import JOURNAL, PRIVATE_FOLDER
from abliterate.checkpoint.source import HUBS_OWN, INDEX_NAME, Checkpoint, read_json


def compare_head(plan: EditPlan, result: Checkpoint) -> list[str]:
    """The added head must be the base's embedding, byte for byte."""
    if plan.added_head is None:
        return []
    if plan.added_head not in result.tensors:
        return [f"the untied head '{plan.added_head}' is missing"]
    embedding, head = plan.model_map.embedding.tensor, result.tensors[plan.added_head]
    if same_bytes(plan.checkpoint.folder, embedding, result.folder, head):
        return []
    return [f"'{plan.added_head}' is not the unedited embedding"]


def strange_files(plan: EditPlan, result: Checkpoint) -> list[str]:
    """Files of the result that neither the base has nor this tool writes."""
    known = {*plan.checkpoint.other_files, *HUBS_OWN, "README.md", "abliterate.json", JOURNAL}
    found = [*result.other_files, *result.left_out]
    return [name for name in found if name not in known and not name.startswith(f"{PRIVATE_FOLDER}/")]


def compare_files(plan: EditPlan, written: Path) -> tuple[int, list[str]]:
    """How many of the other files are identical, and what is wrong with the rest."""
    source = plan.checkpoint
    same, failures = 0, []
    expected = [name for name in source.other_files if name not in ("README.md", "abliterate.json")]
    if source.index is not None and plan.added_head is None:
        expected.append(INDEX_NAME)
    for name in expected:
        path = written / name
        if not path.is_file():
            failures.append(f"file {name} is missing")
        elif name == "config.json" and plan.sets_untied:
            if read_json(path) != untied_config(source.config):
                failures.append("config.json differs in more than tie_word_embeddings")
        elif sha256_file(path) != sha256_file(source.folder / name):
            failures.append(f"file {name} changed")
        else:
            same += 1
    return same, failures
