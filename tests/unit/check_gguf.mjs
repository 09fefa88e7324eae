// Read a GGUF file with llama.cpp: token ids of texts, and greedy responses to token ids.
import fs from "fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const [file, request] = process.argv.slice(2);
const llama = await getLlama({build: "never", gpu: false, logLevel: LlamaLogLevel.error, maxThreads: 1});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 256});
const found = [];
for (const {text, ids, said} of JSON.parse(fs.readFileSync(request))) {
  const sequence = context.getSequence();
  const response = [];
  for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
    response.push(Number(token));
    if (response.length >= said.length) break;
  }
  sequence.dispose();
  found.push({tokens: model.tokenize(text, true).map(Number), said: response});
}
console.log(JSON.stringify(found));
process.exit(0);
