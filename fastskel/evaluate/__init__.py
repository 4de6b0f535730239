"""Evaluation of frozen encoders: cached features, nearest neighbours, linear probe, metrics and reports."""

from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.features import FeatureSet, dataset_features, raw_features
from fastskel.evaluate.inference import extract
from fastskel.evaluate.knn import knn_neighbours, knn_predict, knn_rank
from fastskel.evaluate.linear import LinearConfig, LinearResult, choose_config, linear_probe
from fastskel.evaluate.metrics import accuracy, confusion_matrix, mean_class_accuracy, top_k_accuracy
from fastskel.evaluate.run import evaluate_knn, evaluate_linear

__all__ = [
    "TASKS",
    "Evaluation",
    "FeatureSet",
    "LinearConfig",
    "LinearResult",
    "Task",
    "accuracy",
    "choose_config",
    "confusion_matrix",
    "dataset_features",
    "evaluate_knn",
    "evaluate_linear",
    "extract",
    "knn_neighbours",
    "knn_predict",
    "knn_rank",
    "linear_probe",
    "mean_class_accuracy",
    "raw_features",
    "top_k_accuracy",
]
