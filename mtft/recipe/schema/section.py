"""Base of all sections of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

# Every number has an upper end, far beyond what makes sense: past it are overflows and memory that nobody has.
MOST_STEPS = 10**7
Count = Annotated[int, Field(gt=0, le=10**9)]  # rows, steps between two things, tries
Steps = Annotated[int, Field(gt=0, le=MOST_STEPS)]
Tokens = Annotated[int, Field(gt=0, le=10**8)]  # of a batch
Processes = Annotated[int, Field(gt=0, le=1024)]
Rank = Annotated[int, Field(gt=0, le=2**16)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Share = NotNegative
Texts = Annotated[tuple[str, ...], Field(strict=False)]  # lists in YAML
SomeTexts = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
Numbers = Annotated[tuple[Number, ...], Field(strict=False)]
Options = dict[str, StrictInt | StrictFloat | StrictStr | bool]  # of a method, whose own class checks them
WholeNumber = Annotated[int, Field(ge=-(10**9), le=10**9)]
TemplateOptions = dict[str, bool | WholeNumber | Number | str | Texts]  # of a chat template, which reads them
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]  # files are named after tasks


@dataclass(frozen=True)
class PathKind:
    """Says that a key holds a path, or several, which `load_recipe` makes absolute.

    output   relative to the working directory; else to the recipe's folder
    schemes  a text that starts so names something that is no file
    hub      only what looks like a path, or is a folder, is one; anything else is a name on the hub
    options  of a mapping of a method's options, those that hold a path
    member   the path stands before the last colon, the name of something in the file after it
    """

    output: bool = False
    schemes: tuple[str, ...] = ()
    hub: bool = False
    options: tuple[str, ...] = ()
    member: bool = False


INPUT, OUTPUT = PathKind(), PathKind(output=True)
DATA = PathKind(schemes=("hub:", "quickstart:"))
MODEL = PathKind(schemes=("quickstart:",), hub=True)
MERGE_OPTIONS = PathKind(options=("grams",))
BALANCER_OPTIONS = PathKind(options=("groups",))
PYTHON_FUNCTION = PathKind(member=True)


class RecipeSection(BaseModel):
    """Base of all sections: no unknown keys, no change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
