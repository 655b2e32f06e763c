"""Few-shot transfer: episodes, heads on embeddings, and their accuracy, as pure functions."""

from gc_nc.transfer.closed_form_heads import (
    cosine_predictions,
    nearest_mean_predictions,
    ridge_predictions,
)
from gc_nc.transfer.episode_evaluation import (
    HEADS,
    episode_accuracies,
    episode_neural_collapse,
    mean_confidence_interval,
)
from gc_nc.transfer.episode_sampling import Episode, sample_episode, sample_episodes
from gc_nc.transfer.feature_options import transform_features
from gc_nc.transfer.fine_tuning import fine_tune_predictions
from gc_nc.transfer.logistic_head import logistic_regression_predictions
from gc_nc.transfer.whole_set_heads import k_nearest_predictions, linear_probe_predictions

__all__ = [
    "HEADS",
    "Episode",
    "cosine_predictions",
    "episode_accuracies",
    "episode_neural_collapse",
    "fine_tune_predictions",
    "k_nearest_predictions",
    "linear_probe_predictions",
    "logistic_regression_predictions",
    "mean_confidence_interval",
    "nearest_mean_predictions",
    "ridge_predictions",
    "sample_episode",
    "sample_episodes",
    "transform_features",
]
