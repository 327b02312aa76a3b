"""The embeddings of the language model, whose last rows before the padding are action tokens."""

import warnings
from typing import Any

from torch import nn


class ActionVocabulary:
    """The part of `OpenVLAForActionPrediction` that gets, sets and resizes embeddings, and keeps action tokens."""

    config: Any
    action_tokenizer: Any
    language_model: Any
    vocab_size: int

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """As in every model of the library; the new rows come after the action tokens, which keep their ids. With a
        table that loses tokens which actions need, a model neither predicts nor is saved, and a warning says so."""
        resize = super().resize_token_embeddings  # type: ignore[misc]  # of the library's model
        embeddings = resize(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if cut := self._cut_table():
            warnings.warn(f"{cut} It neither predicts nor is saved.", stacklevel=2)
        else:
            self._keep_action_tokens()
        self.vocab_size = self.action_tokenizer.vocabulary_end  # published name, to which the library gives the rows
        return embeddings

    def _cut_table(self) -> str:
        """What is wrong where the embedding table has lost tokens that the model needs; else nothing."""
        end, rows = self.action_tokenizer.vocabulary_end, self.config.text_config.vocab_size
        needed = max(end - 1, self.config.image_token_id, self.config.pad_token_id or 0) + 1
        if rows >= needed:
            return ""
        return (
            f"The embedding table has {rows} rows; action tokens end at {end}, the placeholder of the image "
            f"(image_token_id) is {self.config.image_token_id}: give resize_token_embeddings at least {needed}."
        )

    def _check_table(self) -> None:
        """Raise a `ValueError` if the embedding table has lost tokens that the model needs."""
        if cut := self._cut_table():
            raise ValueError(cut)

    def _keep_action_tokens(self) -> None:
        """Let the config say where they end, also if the table of the language model alone was resized; a `ValueError`
        if they are not there any more."""
        self._check_table()
        self.config.pad_to_multiple_of = self.config.text_config.vocab_size - self.action_tokenizer.vocabulary_end
        self.config.check_fields()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()


__all__ = ["ActionVocabulary"]
