"""Evaluation of frozen encoders: cached features, nearest neighbours, linear probe, metrics and reports."""

from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.features import FeatureSet, dataset_features, raw_features
from fastskel.evaluate.inference import extract
from fastskel.evaluate.knn import knn_neighbours, knn_predict, knn_rank
from fastskel.evaluate.linear import LinearConfig, LinearResult, choose_config, linear_probe
from fastskel.evaluate.metrics import accuracy, confusion_matrix, mean_class_accuracy, top_k_accuracy
from fastskel.evaluate.retrieval import average_precision, evaluate_retrieval, retrieval_scores
from fastskel.evaluate.run import evaluate_knn, evaluate_linear
from fastskel.evaluate.search import CosineSearch

__all__ = [
    "TASKS",
    "CosineSearch",
    "Evaluation",
    "FeatureSet",
    "LinearConfig",
    "LinearResult",
    "Task",
    "accuracy",
    "average_precision",
    "choose_config",
    "confusion_matrix",
    "dataset_features",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_retrieval",
    "extract",
    "knn_neighbours",
    "knn_predict",
    "knn_rank",
    "linear_probe",
    "mean_class_accuracy",
    "raw_features",
    "retrieval_scores",
    "top_k_accuracy",
]
