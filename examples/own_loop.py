"""TRADES with vanilla feature distillation in a training loop of one's own, here on scikit-learn's digits."""

import torch

import advalign as aa

torch.manual_seed(0)
digits = aa.data.load("digits")
x_train, y_train = digits.train.floats(), digits.train.labels
threat = aa.Linf(0.2)


def epochs(objective: aa.Objective, count: int) -> None:
    optimizer = torch.optim.SGD((p for p in objective.parameters() if p.requires_grad), lr=0.05, momentum=0.9)
    for _ in range(count):
        objective.train()
        for rows in torch.randperm(len(y_train)).split(64):
            x, y = x_train[rows], y_train[rows]
            x_adv = objective.perturb(x, y, threat, steps=7)
            loss = aa.total(objective(x, x_adv, y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def network() -> torch.nn.Module:
    return aa.models.build("small-cnn(width=16)", classes=10, channels=1)


vanilla, student = network(), network()
epochs(aa.compose(aa.Natural(), student=vanilla), 4)
epochs(aa.compose(aa.TRADES(beta=3) + aa.VFD(weight=0.05), student=student, vanilla=vanilla), 4)

for name, model in {"vanilla": vanilla, "TRADES+VFD": student}.items():
    result = aa.evaluate(model, digits.test, [aa.attacks.PGD(threat, steps=20)])
    print(name, {attack: f"{accuracy:.1%}" for attack, accuracy in result.accuracies().items()})
