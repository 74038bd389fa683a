from tests.training.conftest import model_folder, recipe, task_files

__all__ = ["model_folder", "recipe", "task_files"]
