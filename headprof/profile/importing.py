"""What `headprof profile import` is asked for, checked before any of it is read, and carried out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headprof.errors import ModelError, UsageError
from headprof.models.finding import model_name
from headprof.models.loading import model_shape, published_shape
from headprof.models.shape import HeadShape
from headprof.profile.finding import default_output
from headprof.profile.head_profile import HeadProfile
from headprof.profile.interchange import Given, import_profile


@dataclass(frozen=True)
class ImportRequest:
    """Other people's scores, and the model that they are of.

    Attributes:
        given: the files, and what they are said to hold.
        model: as for `load_model`; `None` for the embedded model.
        shape: name of a published shape, if the model's configuration is not to be read.
        source: where the scores come from, as text.
        output: the file to write; `None` for `default_output`.
        trust_remote_code: run code that comes with the model's configuration.
    """

    given: Given
    model: str | None = None
    shape: str | None = None
    source: str | None = None
    output: Path | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Find mistakes that need no model and no scores.

        Raises:
            UsageError: as `Given.check`; the model has no name; or the output is no name of a profile.
        """
        self.given.check()
        if self.shape and self.model is None:
            raise UsageError(f"The scores are of some model of the shape {self.shape}: name it with --model.")
        if self.target.suffix != ".safetensors" or self.target.is_dir():
            raise UsageError(
                f"A head profile cannot be written to {self.target}: give the name of a .safetensors file with -o."
            )

    @property
    def target(self) -> Path:
        """The file to write."""
        return self.output or default_output(model_name(self.model))

    def head_shape(self) -> HeadShape:
        """The shape of the model's heads.

        Raises:
            ModelError: the configuration cannot be had.
            UsageError: there is no such published shape.
        """
        try:
            return published_shape(self.shape) if self.shape else model_shape(self.model, self.trust_remote_code)
        except ModelError as error:
            hint = "or say with --shape which published shape the model has, such as llama-3-8b."
            raise ModelError(f"{str(error).removesuffix('.')}, {hint}") from error

    def carry_out(self) -> HeadProfile:
        """Write the profile.

        Raises:
            UsageError: a file does not say which scores it holds, or of which model, and nobody else does.
            ProfileError: a file is malformed, or its layers and heads are not the model's.
            HeadprofError: the model's shape cannot be had, or the disk refused.
        """
        sources = self.given.sources()
        if self.model is None:
            for each in sources:
                each.require_model()
        imported = import_profile(sources, model_name(self.model), self.head_shape(), self.source)
        imported.save(self.target)
        return imported
