"use strict";

const at = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
let asked = 0;

function captioned(address, text) {
  const figure = document.createElement("figure");
  const image = document.createElement("img");
  image.src = address;
  image.alt = text;
  image.loading = "lazy";
  const caption = document.createElement("figcaption");
  caption.textContent = text;
  figure.append(image, caption);
  return figure;
}

async function ask(content) {
  const number = ++asked;
  at("message").textContent = "Looking …";
  let answer;
  try {
    const response = await fetch("answer", { method: "POST", body: content });
    answer = await response.json();
  } catch {
    answer = { error: "No answer. Is `visiontuner demo` still running?" };
  }
  if (number !== asked) return; // another image was chosen meanwhile
  at("message").textContent = answer.error || "";
  at("answer").hidden = Boolean(answer.error);
  if (!answer.error) show(answer);
}

function show(answer) {
  at("label").textContent = answer.label;
  at("probability").textContent = percent(answer.probability);
  mark("confident", answer.confident, "confident", "not sure");
  mark("known", answer.known, "like the training images", "new: unlike the training images, perhaps of no class");
  at("seen").src = answer.seen;
  at("heat-part").hidden = !answer.heat;
  if (answer.heat) at("heat").src = answer.heat;
  const body = at("top").tBodies[0];
  body.replaceChildren(...answer.top_k.map((choice) => {
    const row = document.createElement("tr");
    const bar = document.createElement("progress");
    bar.value = choice.probability;
    bar.setAttribute("aria-hidden", "true");
    row.insertCell().textContent = choice.label;
    row.insertCell().textContent = percent(choice.probability);
    row.insertCell().append(bar);
    return row;
  }));
  at("nearest-part").hidden = !answer.nearest;
  at("nearest").replaceChildren(...(answer.nearest || []).map((one) =>
    captioned(`training/${one.number}`, `${one.label} ${one.similarity.toFixed(2)}`)));
  document.body.dataset.answer = JSON.stringify({ label: answer.label, probability: answer.probability, known: answer.known });
}

function mark(id, value, yes, no) {
  at(id).hidden = value === null || value === undefined;
  at(id).textContent = value ? yes : no;
  at(id).classList.toggle("bad", !value);
}

async function begin() {
  const model = await (await fetch("model")).json();
  document.title = `${model.title} – visiontuner`;
  at("title").textContent = `${model.title}: ${model.classes} classes`;
  at("examples-part").hidden = !model.examples.length;
  at("examples").replaceChildren(...model.examples.map((name, number) => {
    const button = document.createElement("button");
    button.type = "button";
    const image = document.createElement("img");
    image.src = `example/${number}/thumbnail`;
    image.alt = "";
    const text = document.createElement("span");
    text.textContent = name || `image ${number + 1}`;
    button.append(image, text);
    button.addEventListener("click", async () => ask(await (await fetch(`example/${number}`)).blob()));
    return button;
  }));
}

at("file").addEventListener("change", () => at("file").files[0] && ask(at("file").files[0]));
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    const file = kind === "drop" && event.dataTransfer.files[0];
    if (file) ask(file);
  });
}
document.addEventListener("paste", (event) => {
  const file = event.clipboardData.files[0];
  if (file) ask(file);
});
begin();
