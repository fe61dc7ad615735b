"""Softmax: Sun et al., Deep Learning Face Representation from Predicting 10,000 Classes, CVPR 2014."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from raydml.losses._base import ClassLoss, class_vectors, mean_cross_entropy


class Softmax(ClassLoss):
    """Softmax: the cross-entropy of a linear classifier on the embeddings; takes no miner.

    With class vectors w and biases b, the logits of x_i are <x_i, w_c> + b_c; the loss is the mean over the batch of

        log sum_c exp(logit_ic) - logit_{i, y_i}

    The plainest way to learn an embedding: train a classifier and throw its last layer away. Embeddings, class vectors
    and biases are used as they come: on unit embeddings the length of the class vectors sets the temperature.

    Weights and biases start uniform in +-1/sqrt(embedding_dim), as torch's linear layer does. See normalized_softmax
    for the form without bias and with a fixed temperature.
    """

    def __init__(self, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = class_vectors(num_classes, embedding_dim)
        bound = embedding_dim**-0.5
        self.bias = nn.Parameter(torch.empty(num_classes).uniform_(-bound, bound))

    def cost(self, points: Tensor, labels: Tensor) -> Tensor:
        logits = functional.linear(points, self.weight.to(points.dtype), self.bias.to(points.dtype))
        return mean_cross_entropy(logits, labels)
