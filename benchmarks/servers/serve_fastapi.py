"""Plain FastAPI: the session behind a route, in FastAPI's own threads, as its documentation has it."""

from __future__ import annotations

from typing import Any

import uvicorn
from classifier import PORT, Classifier
from fastapi import FastAPI
from pydantic import BaseModel


class Question(BaseModel):
    """One text."""

    inputs: str


app, classify = FastAPI(), Classifier()


@app.post("/predict")
def predict(question: Question) -> list[dict[str, Any]]:
    """The labels of one text."""
    return classify([question.inputs])[0]


if __name__ == "__main__":
    uvicorn.run(app, port=PORT, loop="uvloop", http="httptools", access_log=False)
