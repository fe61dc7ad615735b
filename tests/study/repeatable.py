"""What of the results of a study is the same whenever they are made."""


def repeatable(results):
    """Results without the footprint of networks, whose times are measured anew. results: as read from JSON."""
    if isinstance(results, dict):
        return {name: repeatable(value) for name, value in results.items() if name != "footprint"}
    return [repeatable(value) for value in results] if isinstance(results, list) else results
