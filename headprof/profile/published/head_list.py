"""QRHead's lists (Zhang et al. 2025, arXiv 2506.09944): query heads, best first.

`src/qrretriever/configs/*.yaml` name them as one text, `attn_head_set: "13-18,13-21"`, without scores. What its
detection writes is JSON, `[["13-18", 0.5], ...]`, with a score for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.errors import ProfileError
from headprof.profile.faults import LARGEST_SCORE
from headprof.profile.head_table import parse_head_key, read_text
from headprof.profile.imported_scores import ImportedScores
from headprof.profile.papers_json import read_json
from headprof.profile.published.kv_table import check_head, check_size, is_number
from headprof.utils.records import plain, shortened

if TYPE_CHECKING:
    from headprof.models.shape import HeadShape

_SET = "attn_head_set"
_LARGEST_FILE, _MOST_BRACKETS = 2**16, 64
"""Beyond these PyYAML may take hours; a list of five thousand heads has 30 kB."""
_OF_VALUES = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)
"""What PyYAML lets through of values that are not what their tags say."""
_NO_LIST = f'{{path}} lists no heads: give a text such as "13-18,13-21" as its {_SET}.'


def listed_scores(path: Path, shape: HeadShape) -> ImportedScores:
    """Scores of the heads in a list; of `n` without scores the first gets 1, the next `(n - 1) / n`, the last `1 / n`.

    Heads that are not listed get 0, and so do scores below zero.

    Raises:
        ProfileError: the file is no such list, names a head twice, or one that the model does not have.
    """
    import torch

    names, values, model = _read(path)
    scores = torch.zeros(shape.num_layers, shape.num_heads, dtype=torch.float64)
    heads = [parse_head_key(path, name) for name in names]
    for name, head in zip(names, heads, strict=True):
        check_head(path, name, head, (shape.num_layers, shape.num_heads))
    if len(set(heads)) < len(heads):
        twice = next(head for number, head in enumerate(heads) if head in heads[:number])
        raise ProfileError(f"{path} lists head {twice[0]}-{twice[1]} twice: leave it where it ranks highest.")
    count = len(heads)
    given = [1 - rank / count for rank in range(count)] if values is None else values
    for head, value in zip(heads, given, strict=True):
        scores[head] = value
    return ImportedScores(scores.float().clamp(min=0), _remarks(given, values is None, scores.numel()), model=model)


def named_model(path: Path) -> str | None:
    """What the file calls its model, if it does; raises `ProfileError` as `listed_scores`."""
    return _read(path)[2]


def _remarks(given: Sequence[float], ranked: bool, num_heads: int) -> tuple[str, ...]:
    count, remarks = len(given), []
    if ranked:
        remarks.append(f"{count} heads are listed without scores, best first: the first gets 1, the last 1/{count}.")
    if count < num_heads:
        remarks.append(f"The {num_heads - count} heads that are not listed get 0.")
    if negative := sum(value < 0 for value in given):
        remarks.append(f"{negative} heads with a score below zero get 0.")
    return tuple(remarks)


def _read(path: Path) -> tuple[list[str], list[float] | None, str | None]:
    """Heads in their order, their scores if they have any, and the model's name if it is said."""
    check_size(path, _LARGEST_FILE)
    if read_text(path).lstrip().startswith("["):
        return *_with_scores(path, read_json(path)), None
    table = _read_yaml(path)
    listed = table.get(_SET)
    if listed == "full_heads":
        raise ProfileError(f"{path} names all heads, and so ranks none: give a list of some heads.")
    names = listed.split(",") if isinstance(listed, str) else listed
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names) or not names:
        raise ProfileError(_NO_LIST.format(path=path))
    model = table.get("model_name_or_path")
    return [name.strip() for name in names], None, plain(model, 200) if isinstance(model, str) else None


def _with_scores(path: Path, listed: Any) -> tuple[list[str], list[float]]:
    pairs = listed if isinstance(listed, list) else []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str) or not is_number(pair[1]):
            raise ProfileError(f'{path} has {shortened(pair)} in its list: give pairs such as ["13-18", 0.5].')
        if not abs(pair[1]) <= LARGEST_SCORE:
            raise ProfileError(f"{path} has {shortened(pair[1])} for head {plain(pair[0])}: give a finite number.")
    if not pairs:
        raise ProfileError(f'{path} lists no heads: give pairs such as ["13-18", 0.5].')
    return [name for name, _ in pairs], [float(value) for _, value in pairs]


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    text = read_text(path)
    if text.count("[") + text.count("{") > _MOST_BRACKETS:
        raise ProfileError(_NO_LIST.format(path=path))
    try:
        # What a file refers to twice can be made to grow without end, and none of these has a reason to.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise ProfileError(f"{path} has references in it, which a list of heads does not need: write them out.")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        table = yaml.safe_load(text)
    except (yaml.YAMLError, *_OF_VALUES) as error:
        raise ProfileError(f"{path} is not valid YAML: download it again.") from error
    if not isinstance(table, dict) or not isinstance(node, yaml.MappingNode) or _SET not in table:
        raise ProfileError(_NO_LIST.format(path=path))
    if sum(key.value == _SET for key, _ in node.value) > 1:
        raise ProfileError(f"{path} gives its {_SET} twice: leave one of them.")
    return table
