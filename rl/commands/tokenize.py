"""`imagerl tokenize`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    from imagerl.models.common.image_tokenizer import ImageTokenizer


def tokenize(
    picture: Annotated[Path, typer.Argument(help="any picture file")],
    model: Annotated[str, typer.Option(help='model folder, "tiny", or a file with TA-Tok weights')] = "tiny",
    scale: Annotated[
        int, typer.Option(min=1, max=3, help="patches of a side that one token stands for, TA-Tok only")
    ] = 1,
    json: Annotated[Path | None, typer.Option(help="also write the tokens to this file")] = None,
) -> None:
    """Show a picture's tokens as the language model reads them, one row of the picture a line."""
    from imagerl.models.common.pictures import crop_note, prepare_picture
    from imagerl.rl.files.metrics import to_json
    from imagerl.rl.files.reading import read_picture
    from imagerl.rl.files.writing import write_atomic

    pixels = read_picture(picture)
    tokenizer = _tokenizer_of(model)
    rows, columns = tokenizer.grid_at(scale)
    if note := crop_note(pixels, tokenizer.picture_size):
        print(f"imagerl: {note}", file=sys.stderr)
    tokens = tokenizer.encode(prepare_picture(pixels, tokenizer.picture_size)[None], scale)
    grid = tokens.view(rows, columns).tolist()
    width = len(str(tokenizer.num_codes - 1))
    for row in grid:
        print(" ".join(f"{token:{width}d}" for token in row))
    if json is not None:
        document = {"picture": str(picture), "model": model, "scale": scale}
        write_atomic(json, to_json({**document, "codes": tokenizer.num_codes, "tokens": grid}) + "\n")


def _tokenizer_of(model: str) -> ImageTokenizer:
    from imagerl.models.blip3o_next.ta_tok import load_ta_tok
    from imagerl.models.families import load_policy

    if Path(model).is_file():
        return load_ta_tok(Path(model))
    tokenizer: ImageTokenizer | None = getattr(load_policy(model), "image_tokenizer", None)
    if tokenizer is None:
        raise ImageRLError(f"{model} has no image tokenizer; give a model that has one, or a TA-Tok file")
    return tokenizer
